"""A real browser for tests: headless Chromium with the page of a service."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from helpers import load_benchmark, need
from serving_helpers import until

script = load_benchmark("page")


@contextmanager
def chromium() -> Iterator[Any]:
    """Yield the browser, with a simulated camera; skip without one."""
    found = script.find_chromium()
    need("Chromium", found)
    need("playwright", importlib.util.find_spec("playwright"))
    from playwright.sync_api import sync_playwright

    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=[*script.QUIET, *camera])
        yield opened
        opened.close()


class Visit:
    """An open page, and all errors on it."""

    def __init__(self, browser: Any, address: str, **context: Any) -> None:
        self.context = browser.new_context(**context)
        self.page, self.wrong, self.hosts = self.context.new_page(), list[str](), set[str]()
        self.page.on(
            "console", lambda m: m.type in ("error", "warning") and self.wrong.append(m.text)
        )
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on(
            "request",
            lambda r: self.hosts.add(r.url.split("/")[2] if r.url.startswith("http") else ""),
        )
        self.page.add_init_script(
            "document.addEventListener('securitypolicyviolation', "
            "e => console.error('CSP ' + e.violatedDirective))"
        )
        self.page.goto(address)
        self.page.locator("#model option").first.wait_for(state="attached")

    def __enter__(self) -> "Visit":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self.context.close()
        if kind is None:
            assert self.wrong == [] and len(self.hosts - {""}) == 1

    def captions(self, count: int) -> list[str]:
        """Wait for ``count`` cards and return their captions, newest first."""
        until(lambda: self.page.locator(".card").count() == count, f"{count} cards")
        return [
            " ".join(text.split()) for text in self.page.locator(".card .caption").all_inner_texts()
        ]
