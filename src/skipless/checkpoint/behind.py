"""A worker thread that does work in order while the caller goes on."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Behind:
    """A thread of this name. Waiting work holds at most `room` bytes, or is a single piece."""

    def __init__(self, name: str, room: int):
        self._thread, self._room = ThreadPoolExecutor(1, name), room
        self._waiting: deque[tuple[int, Future[None]]] = deque()

    def add(self, size: int, work: Callable[..., None], *arguments: object) -> None:
        """Queue work that holds `size` bytes. Raises what earlier work raised."""
        while self._waiting and (
            self._waiting[0][1].done() or size + sum(held for held, _ in self._waiting) > self._room
        ):
            self._waiting.popleft()[1].result()
        self._waiting.append((size, self._thread.submit(work, *arguments)))

    def finish(self) -> None:
        """Wait for all queued work. Raises what it raised."""
        while self._waiting:
            self._waiting.popleft()[1].result()

    def close(self) -> None:
        """Let the current piece finish, drop the rest, and end the thread."""
        self._thread.shutdown(cancel_futures=True)
