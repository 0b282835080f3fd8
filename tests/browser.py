"""Pages as a browser shows them: headless Chromium or Chrome, if there is one."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"needs one of {', '.join(NAMES)}: apt-get install chromium")


def shown(page: Path | str, width: int = 1280) -> tuple[str, list[str]]:
    """A page's HTML once its scripts have run, and what they have complained of."""
    address = page.as_uri() if isinstance(page, Path) else page
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=20000"]
    done = subprocess.run(
        [BROWSER, *options, f"--window-size={width},900", "--dump-dom", address],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    return done.stdout, re.findall(r"CONSOLE.*?\] (.*)", done.stderr)
