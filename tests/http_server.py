"""A folder over http on this machine, as a good server gives it, and as bad ones do."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Server(ThreadingHTTPServer):
    """requests: (method, path) of all so far. fault: called with a request before it is answered; True if it was
    answered. ranges, marks: whether it reads ranges, and tells ETag and time.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), lambda *args: Handler(*args, directory=str(folder)))
        self.requests: list[tuple[str, str]] = []
        self.fault: Any = lambda handler: False
        self.ranges = self.marks = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, whole: bool) -> None:
        self.server.requests.append((self.command, self.path))
        if self.server.fault(self):
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return super().do_GET() if whole else super().do_HEAD()
        size, asked = path.stat().st_size, self.headers.get("Range")
        start, stop = 0, size
        if asked and self.server.ranges:
            first, last = asked.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last) + 1, size)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        else:
            self.send_response(200)
        if self.server.marks:
            found = path.stat()
            self.send_header("ETag", f'"{found.st_size:x}-{found.st_mtime_ns:x}"')
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if whole:
            with path.open("rb") as file:
                file.seek(start)
                self.wfile.write(file.read(stop - start))


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server of a folder, for as long as the block lasts."""
    server = Server(folder)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def hang(seconds: float) -> Any:
    """A fault: no answer for so long."""
    return lambda handler: time.sleep(seconds) or True
