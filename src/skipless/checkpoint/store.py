"""A folder at a URL, by fsspec: each request ends within a time, is made again where that may help, and gives as many
bytes as were asked for; and nothing that is said of it holds a secret.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from skipless.checkpoint.headers import MOST_FILES, MOST_NESTED
from skipless.errors import InputError, StorageError

T = TypeVar("T")

# Bytes that are asked for at a time: beside them, the time until an answer begins is little.
RANGE = 2**23
# Kinds of URLs in which what stands before @ is the name of something, not of somebody.
NAMES_BEFORE_AT = frozenset({"abfs", "abfss", "az", "github", "wasb", "wasbs"})
# Answers of a server after which another request may succeed.
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
# Errors of a request that will be the same again.
LASTING = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


@dataclass(frozen=True)
class Policy:
    """How long a request may take, and how often it is made.

    wait: seconds until an answer must have come, and for what it holds, bytes / slowest (bytes a second) more; tries:
    how often in all, `pause` seconds after the first, and twice as long each time.
    """

    wait: float = 20.0
    slowest: float = 2.0**17
    tries: int = 3
    pause: float = 1.0


POLICY = Policy()


class Store:
    """The folder at a URL. Raises InputError if fsspec has no file system for it; of what a request comes upon, of
    whatever kind, StorageError in one line.

    name: the URL without secrets: kind, host and path.
    """

    def __init__(self, url: str):
        self.name, self._secrets = redacted(url), secrets(url)
        if "::" in url:
            raise InputError(f"{self.name}: expected one URL, found several in each other (::); give the last one")
        try:
            opened = within(POLICY.wait, partial(fsspec.core.url_to_fs, url, **_options(url)))
        except Exception as error:  # whatever the package for that kind of URL raises
            raise InputError(f"{self.name}: expected a URL that fsspec opens, found: {self._line(error)}") from None
        self._system, self._root = opened[0], opened[1].rstrip("/")

    def files(self) -> dict[str, Mapping[str, Any]]:
        """What the store's lists say of each file, by its path in this folder; none if there is no folder."""
        entries: dict[str, Mapping[str, Any]] = {}
        folders = [""]
        while folders:
            folder = folders.pop()
            for name, entry in self._list(folder):
                if entry.get("type") == "directory":
                    folders.append(name)
                else:
                    entries[name] = entry
            if len(entries) + len(folders) > MOST_FILES or folder.count("/") >= MOST_NESTED:
                raise InputError(
                    f"{self.name}: expected at most {MOST_FILES:,} files in this folder, {MOST_NESTED} folders within "
                    f"each other, found more; give the URL of a model folder"
                )
        return dict(sorted(entries.items()))

    def _list(self, folder: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """What is in a folder of this one."""
        path, prefix = self._path(folder), f"{self._root}/"

        def asked() -> list[Mapping[str, Any]]:
            with suppress(FileNotFoundError):
                return list(self._system.ls(path, detail=True))
            return []

        for entry in self._ask(folder, "could not be read", asked):
            name = str(entry["name"]).rstrip("/")
            if name == path or (self._is_http and re.search("[?#]", name.removeprefix(prefix))):
                continue  # itself, or what a server's page leads to beside its files
            if not name.startswith(prefix) or not _is_inside(name.removeprefix(prefix)):
                raise InputError(f"{self.name}: expected names of files in this folder, found {self._line(name)!r}")
            yield name.removeprefix(prefix), entry

    @property
    def _is_http(self) -> bool:
        return self.name.startswith(("http://", "https://"))

    def info(self, name: str) -> Mapping[str, Any]:
        """What the store says of a file now."""

        def asked() -> Mapping[str, Any]:
            self._system.invalidate_cache()
            entry: Mapping[str, Any] = self._system.info(self._path(name))
            return entry

        return self._ask(name, "could not be read", asked)

    def size(self, name: str, info: Mapping[str, Any]) -> int:
        """The bytes of a file of which the store says this. Raises InputError if that is not among it."""
        size = info.get("size")
        if type(size) is not int or size < 0:
            raise InputError(f"{self.name}/{name}: expected a file whose size the store tells, found size {size!r}")
        return size

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes of a file from `start` to `stop`, all of them."""

        def asked() -> bytes:
            data: bytes = self._system.cat_file(self._path(name), start, stop)
            if len(data) != stop - start:
                raise ConnectionError(
                    f"expected {stop - start:,} bytes, found {len(data):,}: the connection was cut, or the server "
                    f"reads no ranges"
                )
            return data

        return self._ask(name, "could not be read", asked, stop - start) if stop > start else b""

    def exists(self, name: str = "") -> bool:
        """Whether there is a file of this name, or this folder, now."""

        def asked() -> bool:
            self._system.invalidate_cache()
            return bool(self._system.exists(self._path(name)))

        return self._ask(name, "could not be read", asked)

    def send(self, file: Path, name: str) -> None:
        """Put a file there."""
        path = self._path(name)

        def asked() -> None:
            self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._system.put_file(str(file), path)

        self._ask(name, "could not be written", asked, file.stat().st_size)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _ask(self, name: str, failure: str, request: Callable[[], T], size: int = 0) -> T:
        """What a request for so many bytes gives, made by POLICY."""
        seconds, pause, tried = POLICY.wait + size / POLICY.slowest, POLICY.pause, 0
        while True:
            try:
                return within(seconds, request)
            except Exception as error:
                tried += 1
                if not _is_passing(error) or tried == POLICY.tries:
                    where = f"{self.name}/{name}" if name else self.name
                    often = f" (tried {tried} times)" if tried > 1 else ""
                    raise StorageError(f"{where}: {failure}: {self._line(error)}{often}") from None
            time.sleep(pause)
            pause *= 2

    def _line(self, problem: object) -> str:
        """What was found, or an error, in one line, without secrets."""
        text = "no such file" if isinstance(problem, FileNotFoundError) else " ".join(str(problem).split())
        text = text or type(problem).__name__
        text = re.sub(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+", lambda match: redacted(match[0]), text)
        for secret in self._secrets:
            text = text.replace(secret, "...")
        return text


def local_path(url: str) -> Path | None:
    """The path that a URL of this machine's own files (file://, local://) means, or None for any other."""
    return Path(LocalFileSystem._strip_protocol(url)) if url.startswith(("file://", "local://")) else None


def redacted(url: str) -> str:
    """Of a URL the kind, host and path: no user, password, query or fragment, which may hold secrets."""
    kind, _, rest = _chained(url)[-1].partition("://")
    host, slash, path = re.split("[?#]", rest, maxsplit=1)[0].partition("/")
    if kind not in NAMES_BEFORE_AT:
        host = host.rpartition("@")[2]
        if not re.fullmatch(r"[^:]*(:\d*)?|\[.*\](:\d*)?", host):  # part of a password that no URL may hold
            return f"{kind}://..."
    return f"{kind}://{host}{slash}{path}"


def secrets(url: str) -> list[str]:
    """What `redacted` leaves out of a URL, percent-encoded and decoded, the longest first."""
    hidden: set[str] = set()
    for one in _chained(url):
        with suppress(ValueError):  # of what is no URL
            parts = urlsplit(one)
            named = parts.scheme in NAMES_BEFORE_AT
            user = "" if named else parts.netloc.rpartition("@")[0]
            values = [value for _, value in parse_qsl(parts.query, keep_blank_values=True)]
            hidden |= {user, *user.split(":", 1), parts.query, *parts.query.split("&"), *values, parts.fragment}
            hidden |= {piece.partition("=")[2] for piece in parts.query.split("&")}
    hidden |= {unquote(secret) for secret in hidden}
    return sorted((secret for secret in hidden if len(secret) > 2), key=len, reverse=True)


def _chained(url: str) -> list[str]:
    """The URLs of which fsspec opens one in the other."""
    return re.split(r"::(?=[A-Za-z][\w+.-]*://)", url)


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` gives or raises; TimeoutError if that takes longer: its thread is then left to itself."""
    answer: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def carry_out() -> None:
        try:
            answer.put((work(), None))
        except BaseException as error:
            answer.put((None, error))

    threading.Thread(target=carry_out, name="request", daemon=True).start()
    try:
        given, error = answer.get(timeout=seconds)
    except Empty:
        error = TimeoutError()
    if isinstance(error, TimeoutError):  # the store's own, too, which does not say more
        raise TimeoutError(f"no answer within {seconds:,.0f} s") from None
    if error is not None:
        raise error
    result: T = given
    return result


def _is_passing(error: Exception) -> bool:
    """Whether another request may succeed."""
    status = getattr(error, "status", getattr(getattr(error, "response", None), "status_code", None))
    if isinstance(status, int) and status:
        return status in PASSING
    names = {kind.__name__ for kind in type(error).__mro__}  # of aiohttp and httpx
    dropped = bool(names & {"ClientConnectionError", "ClientPayloadError", "TransportError"})
    return dropped or (isinstance(error, OSError) and not isinstance(error, LASTING))


def _is_inside(name: str) -> bool:
    """Whether a path leads to a file in a folder, wherever it is put."""
    parts = name.split("/")
    return "\\" not in name and all(
        part not in ("", ".", "..") and part.isprintable() and len(part.encode()) < 256 for part in parts
    )


def _options(url: str) -> dict[str, Any]:
    """Options of the file system of a URL: of http, whose client waits for ever and takes what comes, other ones."""
    kind = url.partition("://")[0]
    if kind not in ("http", "https"):
        return {}
    client: dict[str, Any] = {}
    for configured in ("http", "https"):
        client |= fsspec.config.conf.get(configured, {}).get("client_kwargs", {})
    client["headers"] = {"Accept-Encoding": "identity", **client.get("headers", {})}
    client["raise_for_status"] = _only_ranges
    with suppress(ImportError):  # of which fsspec will tell
        import aiohttp

        client["timeout"] = aiohttp.ClientTimeout(None, sock_connect=POLICY.wait, sock_read=POLICY.wait)
    return {"client_kwargs": client}


async def _only_ranges(response: Any) -> None:
    """Raise ValueError for an answer of more than the range that was asked for, before it is read."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", response.request_info.headers.get("Range", ""))
    if asked and response.status < 300:
        most, found = int(asked[2]) - int(asked[1]) + 1, response.content_length
        if found is None or found > most:
            size = "an answer of any length" if found is None else f"{found:,}"
            raise ValueError(f"expected {most:,} bytes, found {size}: the server reads no ranges")
