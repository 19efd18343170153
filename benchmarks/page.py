"""Takes results/page.png: the page of ``capgen serve`` with a word's attention shown.

    .venv/bin/python benchmarks/page.py

Needs Chromium, and playwright from the development extra.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

PHOTO = REPOSITORY / "data" / "photos" / "dog_panting.jpg"
WORD = "dog"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]


def find_chromium() -> str | None:
    """Return a Chromium of this system."""
    return next(filter(None, map(shutil.which, CHROMIUM)), None)


def show(page: Any, address: str, photo: Path, word: str) -> None:
    """Open the page, upload a photograph, wait for its caption, and point at one of its words."""
    page.goto(address)
    page.locator("#model option").first.wait_for(state="attached")
    page.set_input_files("#files", str(photo))
    page.wait_for_selector(".card .word", timeout=120_000)
    words = page.locator(".card .word")
    texts = words.all_inner_texts()
    words.nth(texts.index(word) if word in texts else 0).hover()
    page.wait_for_selector(".card canvas.on")
    page.locator(".card details summary").click()
    words.nth(texts.index(word) if word in texts else 0).hover()
    page.wait_for_timeout(400)  # the map fades in


def main() -> int:
    """Take the picture."""
    from playwright.sync_api import sync_playwright

    from benchmarks.load import serving

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "results" / "page.png")
    parser.add_argument("--width", type=int, default=900)
    parser.add_argument("--height", type=int, default=1240)
    parser.add_argument("--dark", action="store_true")
    options = parser.parse_args()
    chromium = find_chromium()
    if chromium is None:
        parser.error("Chromium is missing: apt install chromium")
    with serving(None) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=QUIET)
        page = browser.new_page(
            viewport={"width": options.width, "height": options.height},
            color_scheme="dark" if options.dark else "light",
        )
        show(page, server.address, PHOTO, WORD)
        page.screenshot(path=options.output)
        browser.close()
    shrink(options.output)
    print(f"written: {options.output}")
    return 0


def shrink(path: Path) -> None:
    """Store a screenshot with 256 colours: a third of the bytes."""
    from PIL import Image

    with Image.open(path) as image:
        small = image.convert("RGB").quantize(256, dither=Image.Dither.FLOYDSTEINBERG)
    small.save(path, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
