"""Work done in order by another thread, beside what comes next."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Behind:
    """A thread of this name; what waits for it holds at most `room` bytes, or is one piece of work."""

    def __init__(self, name: str, room: int):
        self._thread, self._room = ThreadPoolExecutor(1, name), room
        self._waiting: deque[tuple[int, Future[None]]] = deque()

    def add(self, size: int, work: Callable[..., None], *arguments: object) -> None:
        """Have something done that holds `size` bytes. Raises what earlier work has raised."""
        while self._waiting and (
            self._waiting[0][1].done() or size + sum(held for held, _ in self._waiting) > self._room
        ):
            self._waiting.popleft()[1].result()
        self._waiting.append((size, self._thread.submit(work, *arguments)))

    def finish(self) -> None:
        """Wait for all of it. Raises what it has raised."""
        while self._waiting:
            self._waiting.popleft()[1].result()

    def close(self) -> None:
        """End the thread once it has done what it is at, and leave out what still waits."""
        self._thread.shutdown(cancel_futures=True)
