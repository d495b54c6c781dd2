"""Pages as a reader and a browser see them: parsed, and in headless Chromium."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "img", "br", "link", "input", "hr", "wbr"}


class Page(HTMLParser):
    """Tags must nest; collects what a reader and a browser would."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


BROWSER = next((name for name in ("chromium", "google-chrome") if shutil.which(name)), "")
# what a page may load: nothing but what it holds
POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'\"><script>window.faults = [];"
    "addEventListener('error', event => faults.push(event.message));"
    "addEventListener('securitypolicyviolation', event => faults.push(event.blockedURI));"
    "for (const name of ['error', 'warn']) console[name] = text => faults.push(`${text}`);</script>"
)
PROBE = """<script>addEventListener('load', () => {
  const root = document.documentElement, images = [...document.images];
  parent.postMessage(JSON.stringify({
    wide: root.scrollWidth, shown: images.filter(image => image.naturalWidth > 0).length,
    colour: getComputedStyle(root).getPropertyValue('--c0').trim(),
    table: document.querySelector('.wide table').getBoundingClientRect().width,
    ...(EXTRA)(), faults: window.faults,
  }), '*')})</script></body>"""
NOTHING = "() => ({})"
FRAME = """<meta name=color-scheme content="light dark"><script>addEventListener('message', event => {
  document.body.dataset.found = event.data })</script>
<body><iframe src=page.html style="width:WIDTHpx;height:900px;border:0"></iframe>"""


def in_browser(
    html: str, folder: Path, *, dark: bool, width: int, extra: str = NOTHING
) -> dict[str, Any]:
    """What Chromium says of a page in a frame of this width, since no window is as narrow as a phone.

    `faults` are the requests it makes and the errors of its scripts; `extra` is a function of
    JavaScript whose record is added.
    """
    eager = html.replace('loading="lazy"', "")  # so that they are there when the page is loaded
    eager = eager.replace("<head>", f"<head>{POLICY}", 1)
    (folder / "page.html").write_text(eager.replace("</body>", PROBE.replace("EXTRA", extra)))
    (folder / "frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    done = subprocess.run(
        [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/chrome",
         f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--window-size=1400,1000", "--hide-scrollbars",
         "--virtual-time-budget=5000", "--dump-dom", f"file://{folder}/frame.html"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    body = next(a for name, a in Page(done.stdout).tags if name == "body")
    found: dict[str, Any] = json.loads(body["data-found"] or "")
    return found


def browser_log(html: str, folder: Path) -> tuple[list[str], list[str]]:
    """What Chromium's own logs say of a page: lines of its console, and addresses that it asks for. What
    the browser asks for by itself has "not an origin" as its initiator.
    """
    (folder / "logged.html").write_text(html.replace('loading="lazy"', ""))
    done = subprocess.run(
        [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/chrome-log",
         "--enable-logging=stderr", "--v=0", f"--log-net-log={folder}/net.json", "--virtual-time-budget=5000",
         "--dump-dom", f"file://{folder}/logged.html"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    lines = (
        (folder / "net.json").read_text().splitlines()
    )  # an event a line; cut off if it was killed
    params = [json.loads(line.rstrip(","))["params"] for line in lines if '"initiator"' in line]
    asked = {p["url"] for p in params if p["initiator"] != "not an origin"}
    return [line for line in done.stderr.splitlines() if ":CONSOLE:" in line], sorted(asked)
