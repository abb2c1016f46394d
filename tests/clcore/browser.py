"""A real browser for tests of pages and images."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from choreographer.browsers.chromium import Chromium

OFFLINE = ("--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking")
CONSOLE = re.compile(r"[:\]]CONSOLE[:(]")


def browser() -> str:
    """Return the path of Chrome or Chromium; without one the test is skipped, or fails where CI runs."""
    found = os.environ.get("BROWSER_PATH") or Chromium.find_browser(skip_local=False)
    if not found:
        message = "no Chrome or Chromium (apt-get install chromium)"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    return str(found)


def open_page(page: Path, *, width: int = 1280) -> str:
    """Open a file without a network and return its document once its scripts have run.

    Fails if anything was written to the browser's console, which errors and refused loads are.
    """
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", *OFFLINE]
    command += ["--enable-logging=stderr", "--virtual-time-budget=20000", f"--window-size={width},1200"]
    command += [f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    written = [line for line in done.stderr.splitlines() if CONSOLE.search(line)]
    if written:
        raise AssertionError("the page wrote to the console:\n" + "\n".join(written))
    return done.stdout
