"""A real browser without a window, driven over its debugging pipe: clicks, keys, downloads,
pictures of the page.

The pipe carries Chromium's DevTools protocol as JSON with a zero byte after each message, so that
no library and no port is needed.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome binary on PATH")
PATIENCE_S = 60.0
QUIET = ("background-networking", "component-update", "sync", "quic", "gpu")
BY_PIPE = 'exec "$0" "$@" 3<&{} 4>&{}'


class Tab:
    """One page of the browser."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._rest, self._last = read, write, b"", 0
        self._session: str | None = None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        self.ask("Page.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol.  returns its result"""
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._last:
                assert "error" not in answer, answer["error"]
                result: dict[str, Any] = answer["result"]
                return result

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_S
        while b"\0" not in self._rest:
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self._read], [], [], left)[0], "no answer"
            got = os.read(self._read, 1 << 20)
            assert got, "the browser has ended"
            self._rest += got
        message, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def run(self, code: str) -> Any:
        """The value of an expression of JavaScript, a promise's once it is there."""
        answer = self.ask(
            "Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, code: str) -> Any:
        """The value of an expression once it is true; a page that is loading may not know it yet."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                value = self.run(code)
            except AssertionError as error:
                value, problem = None, str(error)
            else:
                problem = "it is false"
            if value:
                return value
            assert time.monotonic() < deadline, f"never true: {code}: {problem}"
            time.sleep(0.02)

    def open(self, url: str) -> None:
        """Load a page, or load it again."""
        self.run("window.pageBefore = true")
        self.ask("Page.navigate", url=url)
        self.wait("!window.pageBefore && document.readyState === 'complete'")

    def click(self, selector: str) -> None:
        """Click into the middle of an element with the mouse."""
        place = self.run(
            f"(() => {{ const e = document.querySelector({selector!r});"
            "e.scrollIntoView({ block: 'nearest' }); const r = e.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        at = {"x": place[0], "y": place[1], "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, **at)

    def key(self, key: str) -> None:
        """Press a key."""
        self.ask("Input.dispatchKeyEvent", type="keyDown", key=key)
        self.ask("Input.dispatchKeyEvent", type="keyUp", key=key)

    def type(self, text: str) -> None:
        """Write into the element that has the focus."""
        self.ask("Input.insertText", text=text)

    def look(self, width: int, height: int, dark: bool = False) -> None:
        """Give the window a size, and the person a liking for a dark or a light page."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, file: Path) -> None:
        """Write a picture of what the window shows."""
        file.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot")["data"]))


@contextmanager
def browser(folder: Path) -> Iterator[Tab]:
    """A page of a browser whose profile is in the folder, and whose downloads are, too."""
    assert CHROMIUM is not None
    to_it, ours = os.pipe()
    from_it, its = os.pipe()
    options = [f"--disable-{name}" for name in QUIET]
    options += ["--headless", "--no-sandbox", "--no-first-run", "--hide-scrollbars"]
    options += [f"--user-data-dir={folder / 'profile'}", "--remote-debugging-pipe"]
    process = subprocess.Popen(
        ["bash", "-c", BY_PIPE.format(to_it, its), CHROMIUM, *options, "about:blank"],
        pass_fds=(to_it, its),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_it)
    os.close(its)
    try:
        tab = Tab(from_it, ours)
        tab.ask("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        yield tab
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(from_it)
