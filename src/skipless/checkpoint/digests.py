"""SHA-256 of the tensors that are read, computed by another thread.

Each digest covers the very bytes that were used. A source that changes while it is read shows.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import torch

from skipless.checkpoint.reader import CheckpointReader, TensorInfo

# Bytes that may wait to be hashed, unless they are one tensor's.
ROOM = 2**26


class Behind:
    """A worker thread of this name, which does work in order while the caller goes on.

    Waiting work holds at most `room` bytes, or is a single piece.
    """

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


class Digests:
    """Reads tensors of a checkpoint as `reader.tensor` does, and hashes those that it reads whole: at once, or rows in
    their order, from the first to the last. Rows out of turn do not count.

    overwritten: whether what is read may be written over soon; each read then waits until it is hashed.
    """

    def __init__(self, reader: CheckpointReader, overwritten: bool = False):
        self._reader, self._overwritten = reader, overwritten
        self._behind = Behind("hashing", ROOM)
        self._begun: dict[str, tuple[int, Any]] = {}  # of a tensor: the next byte, SHA-256 so far
        self._whole: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._behind.close()

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors' headers, by name."""
        return self._reader.tensors

    def tensor(self, name: str, rows: slice | None = None, /) -> torch.Tensor:
        """Read a tensor, or some of its rows."""
        return self._reader.tensor(name, rows, self._take)

    def _take(self, name: str, start: int, data: memoryview) -> None:
        """Hash what has not been hashed of a tensor's bytes from `start` on, if that is what comes next."""
        following, sha256 = self._begun.get(name, (0, hashlib.sha256()))
        stop = start + len(data)
        if name in self._whole or not start <= following < max(stop, 1):
            return
        self._behind.add(len(data), sha256.update, data[following - start :])
        if self._overwritten:
            self._behind.finish()
        self._begun[name] = stop, sha256
        if stop == self._reader.tensors[name].bytes:
            self._whole[name] = sha256

    def finish(self) -> dict[str, str]:
        """Wait for the digests of all tensors that were read whole."""
        self._behind.finish()
        return {name: sha256.hexdigest() for name, sha256 in self._whole.items()}
