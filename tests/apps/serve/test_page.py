"""The page in a real browser: upload, attention, keyboard, phone; no errors, no other hosts."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser_helpers import Visit, chromium
from helpers import PHOTOS, ROOT, save_tiny_bundle, tiny_dual, tiny_tokenizer
from PIL import Image
from serving_helpers import running, until

from capgen_utils.apps.serve.protection import Limits, Protection
from capgen_utils.apps.serve.served import Served
from capgen_utils.bundle import load_bundle, save_bundle

pytestmark = pytest.mark.browser
PHOTO = PHOTOS / "dog_panting.jpg"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> list[Served]:
    folder = tmp_path_factory.mktemp("page")
    save_tiny_bundle(folder / "tiny")
    read = load_bundle(folder / "tiny")
    save_bundle(
        folder / "tiny",
        read,
        read.build_encoder(),
        scorer=tiny_dual(read.build_encoder(), tiny_tokenizer()),
    )
    save_tiny_bundle(folder / "plain")
    return [Served.load(name, folder / name, device="cpu") for name in ("tiny", "plain")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def visit(browser: Any, served: list[Served]) -> Iterator[Visit]:
    with running(*served) as (client, _), Visit(browser, str(client.base_url)) as visit:
        yield visit


def heat(page: Any) -> list[int]:
    """Return the pixels of the map over the newest photograph, as one long list."""
    script = "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    return list(page.locator(".card canvas").first.evaluate(script))


def test_upload_caption_candidates_and_attention_by_hover(
    visit: Visit, served: list[Served]
) -> None:
    page, expected = visit.page, served[0].captioner.caption(PHOTO)[0]
    page.set_input_files("#files", str(PHOTO))
    assert visit.captions(1) == [expected.text]
    assert page.locator("#status").inner_text() == f"Caption: {expected.text}"
    assert page.locator(".card img").get_attribute("alt") == expected.text
    canvas = page.locator(".card canvas")
    assert "on" not in (canvas.get_attribute("class") or "")
    page.locator(".word").nth(1).hover()
    assert canvas.get_attribute("class") == "on"
    first = heat(page)
    assert len(set(first)) > 10, "the map is not one colour"
    assert "looked most at the" in page.locator(".look").inner_text()
    image, over = page.locator(".card img").bounding_box(), canvas.bounding_box()
    assert over == pytest.approx(image, abs=1)
    page.locator(".word").nth(len(expected.words) - 1).hover()
    page.mouse.move(0, 0)
    assert "on" not in (canvas.get_attribute("class") or "")
    page.locator("summary").click()
    rows = page.locator("tbody tr")
    assert [row.split("\t")[0] for row in rows.all_inner_texts()] == [
        c.text for c in expected.candidates
    ]
    assert (
        page.locator("tbody tr td").nth(1).inner_text()
        == f"{expected.candidates[0].log_probability:.2f}"
    )


def test_choices_of_captioner_and_search_reach_the_captioner(
    visit: Visit, served: list[Served]
) -> None:
    page, captioner = visit.page, served[0].captioner
    page.select_option("#search", "sample")
    page.fill("#candidates", "3")
    page.fill("#temperature", "1.5")
    page.fill("#seed", "7")
    page.set_input_files("#files", [str(PHOTO), str(PHOTOS / "cat_on_deck.jpg")])
    drawn = captioner.caption(
        [PHOTO, PHOTOS / "cat_on_deck.jpg"], temperature=1.5, top_p=0.9, candidates=3, seed=7
    )
    assert visit.captions(2) == [caption.text for caption in reversed(drawn)], (
        "a history, the newest first"
    )
    assert "Candidates (3)" in page.locator("summary").first.inner_text()
    page.select_option("#search", "rerank")
    page.click("#again")
    chosen = captioner.caption(PHOTOS / "cat_on_deck.jpg", rerank=True, seed=7)[0]
    assert visit.captions(3)[0] == chosen.text
    page.locator("summary").first.click()
    assert (
        page.locator("tbody tr td").nth(2).inner_text() == f"{chosen.candidates[0].clip_score:.3f}"
    )
    page.select_option("#model", "plain")
    assert page.locator("#search").input_value() == "default", "this one has no CLIP"
    page.select_option("#search", "greedy")
    page.click("#again")
    assert (
        visit.captions(4)[0]
        == served[1].captioner.caption(PHOTOS / "cat_on_deck.jpg", beam=1)[0].text
    )
    page.click("#clear")
    assert visit.captions(0) == [] and page.locator("#empty").is_visible()


def test_images_are_dropped_pasted_and_photographed(visit: Visit) -> None:
    page = visit.page
    transfer = """([data, type]) => {
        const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], 'a.jpg', {type: 'image/jpeg'}));
        document.dispatchEvent(type === 'paste'
            ? new ClipboardEvent('paste', {clipboardData: transfer})
            : new DragEvent('drop', {dataTransfer: transfer, bubbles: true}));
    }"""
    data = base64.b64encode(PHOTO.read_bytes()).decode()
    for count, kind in enumerate(("drop", "paste"), start=1):
        page.evaluate(transfer, [data, kind])
        visit.captions(count)
    assert len(set(visit.captions(2))) == 1
    page.click("#camera")
    until(
        lambda: page.evaluate("document.getElementById('video').videoWidth > 0"),
        "a picture of the camera",
    )
    page.click("#shoot")
    visit.captions(3)
    page.click("#stop")
    assert not page.locator("#viewfinder").is_visible()


def test_the_keyboard_reaches_everything(visit: Visit) -> None:
    page = visit.page
    with page.expect_file_chooser() as chooser:
        page.focus("#files")
        page.keyboard.press("Enter")
    chooser.value.set_files(str(PHOTO))
    words = visit.captions(1)[0].split()
    page.focus("#again")
    page.keyboard.press("Tab")  # the button that clears the history
    page.keyboard.press("Tab")
    focused = "document.activeElement.textContent"
    assert page.evaluate(focused) == words[0]
    assert page.locator(".card canvas").get_attribute("class") == "on"
    before = page.locator(".look").inner_text()
    page.keyboard.press("ArrowRight")
    assert (
        page.evaluate(focused) == words[1] and f"“{words[1]}”" in page.locator(".look").inner_text()
    )
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    assert before
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "focus can be seen"
    for _ in range(len(words)):
        page.keyboard.press("Tab")
    assert page.locator(".card canvas").get_attribute("class") == "on", "what was pressed stays lit"


def test_a_screen_reader_finds_names_for_everything(visit: Visit) -> None:
    page = visit.page
    page.set_input_files("#files", str(PHOTO))
    visit.captions(1)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, img, video, [role=region]')]
            .filter(e => !e.closest('template') && !(e.labels && e.labels.length)
                         && !e.textContent.trim() && !e.getAttribute('aria-label')
                         && !e.getAttribute('alt'))
            .map(e => e.outerHTML)"""
    )
    assert unnamed == []
    assert page.locator("[role=status][aria-live=polite]").count() == 1
    assert (
        page.locator("html[lang=en]").count()
        == page.locator("h1").count()
        == page.locator("main").count()
        == 1
    )


def test_errors_are_explained_on_the_page(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    (tmp_path / "broken.jpg").write_bytes(PHOTO.read_bytes()[:3000])
    page.set_input_files("#files", str(tmp_path / "broken.jpg"))
    page.wait_for_selector("#status.wrong")
    assert page.locator("#status").inner_text().startswith("broken.jpg: image 0 is")
    visit.wrong[:] = [
        text for text in visit.wrong if "422" not in text
    ]  # browsers report every such answer
    page.set_input_files("#files", str(PHOTO))
    assert len(visit.captions(1)) == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(browser: Any, served: list[Served], scheme: str) -> None:
    phone = {
        "viewport": {"width": 360, "height": 740},
        "has_touch": True,
        "is_mobile": True,
        "color_scheme": scheme,
    }
    with (
        running(*served) as (client, _),
        Visit(browser, str(client.base_url), reduced_motion="reduce", **phone) as visit,
    ):
        page = visit.page
        assert (
            page.locator("label[for=snap]").is_visible()
            and not page.locator("#camera").is_visible()
        )
        page.set_input_files("#snap", str(PHOTO))
        visit.captions(1)
        page.locator(".word").nth(1).tap()
        assert page.locator(".card canvas").get_attribute("class") == "on"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
            "nothing sticks out"
        )
        small = page.evaluate(
            "[...document.querySelectorAll('button, label.button, select')]"
            ".filter(e => e.offsetParent).map(e => [e.textContent, e.offsetHeight])"
            ".filter(([, height]) => height < 30)"
        )
        assert small == [], "a finger hits them"
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(ground.split("(")[1].split(",")[0]) < 60) == (scheme == "dark")
        assert (
            page.evaluate(
                "getComputedStyle(document.querySelector('.card canvas')).transitionDuration"
            )
            == "0s"
        )


def test_the_page_asks_for_a_key_and_reports_a_full_queue(
    browser: Any, served: list[Served]
) -> None:
    protection = Protection(api_key="key", rate=None)
    with running(*served, limits=Limits(queue=1, images=1), protection=protection) as (client, app):
        context = browser.new_context()
        page = context.new_page()
        page.goto(str(client.base_url))
        page.wait_for_selector("#key-row:not([hidden])")
        page.fill("#key", "key")
        page.keyboard.press("Tab")
        until(lambda: page.locator("#model option").count() == 2, "both captioners")
        page.set_input_files("#files", str(PHOTO))
        page.wait_for_selector(".card")
        app.state.service.batcher.capacity = 0
        page.click("#again")
        page.wait_for_selector("#status.wrong")
        assert "try again" in page.locator("#status").inner_text()
        assert (
            page.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie])")
            == '[{},{},""]'
        )
        context.close()


def test_the_picture_in_the_repository_is_small_and_of_a_page() -> None:
    with Image.open(ROOT / "results" / "page.png") as picture:
        assert min(picture.size) >= 600
    assert (ROOT / "results" / "page.png").stat().st_size < 250_000


def test_the_page_names_no_other_host() -> None:
    for path in (ROOT / "capgen_utils" / "apps" / "serve" / "page").iterdir():
        text = path.read_text(encoding="utf-8")
        assert "://" not in text.replace("http://www.w3.org", ""), path.name
        assert json.dumps(text) and "style=" not in text and "onclick" not in text
