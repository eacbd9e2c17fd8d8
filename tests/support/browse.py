"""Every page of the built site in a headless Chromium: `make browse`.

Looked for at the width of a phone and of a desk: errors on the console, addresses that are not there, pages wider than
the screen, pictures without alternative text or without data. A picture of each page goes to build/screens.
"""

from __future__ import annotations

import functools
import http.server
import shutil
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SITE, SCREENS = ROOT / "build" / "site", ROOT / "build" / "screens"
WIDTHS = {"phone": 390, "desk": 1280}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
#: What a page tells of itself, in the browser.
LOOK = """() => ({
  wide: document.documentElement.scrollWidth - window.innerWidth,
  widest: [...document.querySelectorAll('main *')].filter(
    e => e.getBoundingClientRect().right > window.innerWidth + 1
      && !e.closest('pre, code, table, .md-typeset__scrollwrap, .jp-OutputArea')
  ).slice(0, 3).map(e => e.tagName + ' ' + (e.innerText || '').slice(0, 40)),
  pictures: [...document.querySelectorAll('main img')].map(
    i => ({src: i.src.slice(0, 80), alt: i.alt, there: i.naturalWidth > 0}))
})"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *args: object) -> None:
        """Say nothing."""


def faults(page, address: str, width: int, screen: Path) -> list[str]:
    """Return what is wrong with a page at a width of the window, in CSS pixels."""
    found: list[str] = []
    page.set_viewport_size({"width": width, "height": 900})
    hear = [
        ("console", lambda message: found.append(f"console: {message.text}") if message.type == "error" else None),
        ("pageerror", lambda error: found.append(f"error: {error}")),
        ("response", lambda answer: found.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None),
    ]
    for what, listener in hear:
        page.on(what, listener)
    page.goto(address, wait_until="load")
    told = page.evaluate(LOOK)
    if told["wide"] > 1:
        found.append(f"{told['wide']} px wider than the screen: {told['widest']}")
    for picture in told["pictures"]:
        found += [] if picture["there"] else [f"a picture without data: {picture['src']}"]
        found += [] if picture["alt"] else [f"a picture without alternative text: {picture['src']}"]
    page.screenshot(path=screen, full_page=False)
    for what, listener in hear:
        page.remove_listener(what, listener)
    return found


def main() -> int:
    """Look at every page; return the exit code, 1 where something is wrong, 3 without a browser."""
    from playwright.sync_api import sync_playwright

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"no browser here ({', '.join(BROWSERS)}): the site was not looked at", file=sys.stderr)
        return 3
    SCREENS.mkdir(parents=True, exist_ok=True)
    serve = functools.partial(Quiet, directory=str(SITE))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pages = sorted(path.relative_to(SITE) for path in SITE.rglob("*.html"))
    wrong = 0
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        page = chromium.new_page()
        for path in pages:
            for name, width in WIDTHS.items():
                screen = SCREENS / f"{path.with_suffix('').as_posix().replace('/', '_')}-{name}.png"
                address = f"http://127.0.0.1:{server.server_port}/{path.as_posix()}"
                for fault in faults(page, address, width, screen):
                    print(f"{path} ({name}): {fault}")
                    wrong += 1
        chromium.close()
    server.shutdown()
    print(f"{len(pages)} pages at {' and '.join(f'{w} px' for w in WIDTHS.values())}: {wrong} faults")
    return 1 if wrong or not pages else 0


if __name__ == "__main__":
    sys.exit(main())
