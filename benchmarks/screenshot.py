"""Takes the README's picture: a page that a run or a comparison wrote, or one of its sections, as a browser shows it.

    python benchmarks/screenshot.py docs/evidence/methods.html docs/images/page.png paired

It needs playwright (`make test` installs it) and a Chromium. The page is opened from the disk; a request for anything
else ends the program.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTH, HEIGHT = 1120, 840
SETTLES = 1500  # milliseconds, until a part that was out of sight is drawn


def main(page: Path, picture: Path, section: str | None = None) -> None:
    """Write the picture of a page, scrolled to a section's heading if one is named."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        sys.exit("no browser: install the Debian package chromium")
    asked: list[str] = []
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        tab = opened.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(page.resolve().as_uri())
        if section:
            tab.evaluate("name => document.getElementById(name).scrollIntoView()", section)
            tab.wait_for_timeout(SETTLES)
        picture.parent.mkdir(parents=True, exist_ok=True)
        tab.screenshot(path=str(picture))
        opened.close()
    if outside := [url for url in asked if url.startswith("http")]:
        sys.exit(f"the page asked for {outside[0]}")
    print(f"{picture}: {picture.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
