"""A browser without a window for tests of pages: Chromium, driven over its debugging pipe.

Only the executable is needed (Debian's package `chromium`, or Google Chrome), no driver and no Python package.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
SECONDS = 60.0
"""Time that an answer may take; a page loads in less than one, on an idle machine."""

# The browser reads commands from descriptor 3 and writes answers to 4.
LAUNCH = """
import fcntl, os, sys
for number, place in zip([fcntl.fcntl(int(each), fcntl.F_DUPFD, 10) for each in sys.argv[1:3]], (3, 4)):
    os.dup2(number, place)
os.execv(sys.argv[3], sys.argv[3:])
"""
OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--hide-scrollbars",
    "--no-first-run",
    "--remote-debugging-pipe",
)


def executable() -> str | None:
    """Return the path of a browser; None if there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser.

    Args:
        path: of the executable.
        profile: an empty folder.

    Attributes:
        events: what the page reported since they were last cleared, as `(method, parameters)`.
    """

    def __init__(self, path: str, profile: Path) -> None:
        read_by_browser, self._to = os.pipe()
        self._from, written_by_browser = os.pipe()
        ends = (read_by_browser, written_by_browser)
        command = [sys.executable, "-c", LAUNCH, *map(str, ends), path, *OPTIONS, f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(command, pass_fds=ends, stderr=subprocess.DEVNULL)
        for end in ends:
            os.close(end)
        self._buffer, self._number, self._session = b"", 0, ""
        self.events: list[tuple[str, dict[str, Any]]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session and not method.startswith(("Browser.", "Target.")):
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        answer: dict[str, Any] = {}

        def answered() -> bool:
            answer.update(self._receive() or {})
            return answer.get("id") == self._number

        self._wait(answered, method)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def open(self, address: str) -> None:
        """Open a page and wait until it has loaded."""
        self.events.clear()
        self.call("Page.navigate", url=address)
        self.wait_for("document.readyState == 'complete'")

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page; promises are awaited."""
        given = {"expression": script, "returnByValue": True, "awaitPromise": True, "userGesture": True}
        found = self.call("Runtime.evaluate", **given)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait_for(self, script: str) -> Any:
        """Wait until an expression is true, and return its value."""
        value: list[Any] = []

        def holds() -> bool:
            value[:] = [self.run(script)]
            if not value[0]:
                time.sleep(0.05)
            return bool(value[0])

        self._wait(holds, script)
        return value[0]

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def _receive(self) -> dict[str, Any] | None:
        """Return the next answer; keep the next event and return None."""
        while b"\0" not in self._buffer:
            if not select.select([self._from], [], [], SECONDS)[0]:
                raise TimeoutError(f"the browser did not answer within {SECONDS} seconds")
            piece = os.read(self._from, 1 << 16)
            if not piece:
                raise RuntimeError(f"the browser ended with {self._process.wait()}")
            self._buffer += piece
        message, self._buffer = self._buffer.split(b"\0", 1)
        found = json.loads(message)
        if "method" in found:
            self.events.append((found["method"], found["params"]))
            return None
        return found

    @staticmethod
    def _wait(done: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + SECONDS
        while not done():
            if time.monotonic() > end:
                raise TimeoutError(f"{what} took more than {SECONDS} seconds")
