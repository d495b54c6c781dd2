"""A tab of headless Chromium with real keys and fingers, by its debugging protocol over two pipes."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.eval.browser import BROWSER

Json = dict[str, Any]
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27}
KEYS |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
FAULTS = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")


class Tab:
    """`faults` are lines of the console, errors of scripts and requests other than of the page itself."""

    def __init__(
        self, folder: Path, *, width: int = 1280, height: int = 900, dark: bool = False
    ) -> None:
        self.folder, self.faults, self._last, self._session = folder, list[str](), 0, ""
        theirs, self._write = os.pipe()
        self._read, answers = os.pipe()
        flags = f"--headless=new --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir={folder}/chrome"
        self._process = subprocess.Popen(
            [
                "bash",
                "-c",
                f"exec {BROWSER} {flags} --remote-debugging-pipe about:blank 3<&{theirs} 4>&{answers}",
            ],
            pass_fds=(theirs, answers),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(answers)
        self._answers, self._rest = os.fdopen(self._read, "rb", 0), b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        phone = width < 600
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        self.call("Emulation.setDeviceMetricsOverride", **size, mobile=phone)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        self.media("screen", dark)

    def __enter__(self) -> Tab:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        os.close(self._write)
        self._process.kill()
        self._process.wait()
        self._answers.close()

    def call(self, method: str, **values: Any) -> Json:
        """Returns the answer to a command; what happens meanwhile is looked through for faults."""
        self._last += 1
        request = {"id": self._last, "method": method, "params": values}
        if self._session:
            request["sessionId"] = self._session
        os.write(self._write, json.dumps(request).encode() + b"\0")
        while (message := self._next()).get("id") != self._last:
            self._look(message)
        assert "error" not in message, message
        result: Json = message["result"]
        return result

    def open(self, html: str) -> None:
        """Loads a page, and waits until it is there."""
        (self.folder / "page.html").write_text(html)
        self.call("Page.navigate", url=f"file://{self.folder}/page.html")
        while (message := self._next()).get("method") != "Page.loadEventFired":
            self._look(message)

    def evaluate(self, script: str) -> Any:
        """Returns the value of an expression of JavaScript."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def becomes(self, script: str, value: object) -> bool:
        """Whether an expression has a value now or soon: some events come a moment later."""
        end = time.monotonic() + 60
        while self.evaluate(script) != value:
            if time.monotonic() > end:
                return False
        return True

    def press(self, *keys: str) -> None:
        for key in keys:
            values: Json = {"key": key, "windowsVirtualKeyCode": KEYS.get(key, ord(key[0].upper()))}
            text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", **values, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", **values)

    def touch(self, *points: tuple[float, float]) -> None:
        """Puts a finger on the first point, moves it over the others and takes it off."""
        for i, (x, y) in enumerate(points):
            kind = "touchMove" if i else "touchStart"
            self.call("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def picture(self, path: Path, whole: bool = False) -> None:
        """Writes what is seen, or the whole page, as a PNG."""
        part: Json = {}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            part = {"captureBeyondViewport": True, "clip": size | {"scale": 1}}
        answer = self.call("Page.captureScreenshot", **part)
        path.write_bytes(base64.b64decode(answer["data"]))

    def media(self, kind: str, dark: bool) -> None:
        """Shows the page as on a "screen" or as for "print", to a reader who prefers light or dark."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=kind, features=[scheme])

    def paper(self) -> bytes:
        """Returns the page on sheets of A4, a PDF whose outline has the headings that are printed."""
        a4 = {"paperWidth": 8.27, "paperHeight": 11.69, "preferCSSPageSize": True}
        answer = self.call("Page.printToPDF", **a4, generateDocumentOutline=True)
        return base64.b64decode(answer["data"])

    def _next(self) -> Json:
        while b"\0" not in self._rest:
            part = self._answers.read(1 << 20)
            assert part, "Chromium has ended"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        message: Json = json.loads(line)
        return message

    def _look(self, message: Json) -> None:
        values = message.get("params", {})
        if message.get("method") in FAULTS:
            self.faults.append(json.dumps(values))
        if message.get("method") == "Network.requestWillBeSent":
            url = values["request"]["url"]
            if not url.startswith(("data:", f"file://{self.folder}/page.html")):
                self.faults.append(url)
