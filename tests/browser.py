"""Pages as a browser shows them: headless Chromium or Chrome, if there is one."""

import functools
import http.server
import queue
import re
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"needs one of {', '.join(NAMES)}: apt-get install chromium")
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr")


def shown(page: Path, width: int = 1280) -> tuple[str, list[str]]:
    """A page's HTML once its scripts have run, and what they have complained of."""
    options = ["--virtual-time-budget=20000", f"--window-size={width},900", "--dump-dom"]
    done = subprocess.run(
        [BROWSER, *OPTIONS, *options, page.as_uri()], capture_output=True, text=True, check=True, timeout=300
    )
    return done.stdout, complaints(done.stderr)


def complaints(log: str) -> list[str]:
    """What scripts have complained of, by the browser's log."""
    return re.findall(r"CONSOLE.*?\] (.*)", log)


def pages(site: Path) -> list[Path]:
    """The pages of a site, but for those that tests add while they run."""
    return sorted(page for page in site.rglob("*.html") if not page.name.startswith("driven-"))


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and keeps what a page sends back."""

    def do_POST(self):
        self.server.sent.put(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.send_response(204)
        self.end_headers()

    def log_message(self, *arguments):
        pass


def driven(site: Path, name: str, script: str, seconds: float = 240) -> tuple[str, list[str]]:
    """What a page of a site has in the end, and what its scripts have complained of: `script` runs after the page's
    own, in as much time as it takes, and calls done().
    """
    done = 'const done = () => fetch("/", { method: "POST", body: document.documentElement.outerHTML });'
    page = site / f"driven-{name}"
    page.write_text(
        (site / name).read_text().replace("</body>", f'<script type="module">{done}{script}</script></body>')
    )
    handler = functools.partial(Handler, directory=site)
    try:
        with (
            http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
            tempfile.TemporaryFile("w+") as log,
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        ):
            server.sent = queue.Queue()
            threading.Thread(target=server.serve_forever, daemon=True).start()
            address = f"http://127.0.0.1:{server.server_port}/{page.name}"
            browser = subprocess.Popen([BROWSER, *OPTIONS, f"--user-data-dir={profile}", address], stderr=log)
            try:
                html = server.sent.get(timeout=seconds)
            finally:
                browser.terminate()
                browser.wait()
                server.shutdown()
                log.seek(0)
            return html, complaints(log.read())
    finally:
        page.unlink()
