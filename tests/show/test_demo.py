"""The demo in a real browser: JupyterLab runs notebook 11; upload, click, caption appears, slider
moves; and Voilà."""

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import PHOTOS, ROOT, load_benchmark, need
from PIL import Image

from capgen_utils.captioner import DEFAULT_BUNDLE, Captioner

pytestmark = pytest.mark.browser
WINDOW = {"width": 1280, "height": 1400}
PHOTO = PHOTOS / "hikers_on_dune.jpg"
NOTEBOOK = ROOT / "notebooks" / "11_caption_your_own_photos.ipynb"
APP = ROOT / "notebooks" / "demo.ipynb"


script = load_benchmark("demo")


@pytest.fixture(scope="module")
def chromium() -> str:
    found = load_benchmark("page").find_chromium()
    need("Chromium", found)
    need("playwright", importlib.util.find_spec("playwright"))
    need("the trained captioner that ships", (DEFAULT_BUNDLE / "model.safetensors").is_file())
    return str(found)


@pytest.fixture(scope="module")
def expected() -> str:
    """What the captioner says of the photograph by the demo's own choices."""
    return Captioner.from_bundle(device="cpu").caption(PHOTO, beam=5)[0].text


@pytest.fixture
def in_lab(chromium: str, tmp_path: Path) -> Iterator[Any]:
    """A page in JupyterLab in which notebook 11 has run as far as the demo."""
    copy = script.up_to(NOTEBOOK, "widgets.demo()", tmp_path / NOTEBOOK.name)
    with (
        script.lab(tmp_path) as address,
        script.browser_page(chromium, viewport={"width": 1280, "height": 1400}) as page,
    ):
        script.run_in_lab(page, address, copy.name)
        page.locator(".capgen-go").wait_for()
        yield page
        errors = page.locator(
            ".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']"
        ).count()
        assert errors == 0, "a cell or a callback threw"


def no_complaint(page: Any) -> bool:
    return page.locator(".capgen-error").count() == 0


def test_upload_click_caption_and_slider_in_jupyterlab(in_lab: Any, expected: str) -> None:
    script.choose_files(in_lab, str(PHOTO))
    assert script.caption(in_lab) == expected and no_complaint(in_lab)
    assert (
        in_lab.locator(".capgen-card img").first.get_attribute("alt") == f"{PHOTO.name}: {expected}"
    )
    words = expected.split()
    assert in_lab.locator(".capgen-steps mark").first.inner_text() == words[0]
    for place in (1, 2):
        marked, text = script.step(in_lab)
        assert marked == words[place] and f"for the word: {words[place]}." in text
    assert no_complaint(in_lab)


def test_a_file_that_is_no_photograph_is_refused_in_the_widget(in_lab: Any, expected: str) -> None:
    letter = {"name": "letter<b>.jpg", "mimeType": "image/jpeg", "buffer": b"Dear captioner"}
    script.choose_files(in_lab, letter)
    in_lab.locator(".capgen-go").click()
    in_lab.locator(".capgen-error").wait_for()
    assert "letter<b>.jpg is not an image" in in_lab.locator(".capgen-error").inner_text()
    assert in_lab.locator(".capgen-card").count() == 0
    script.choose_files(in_lab, str(PHOTO))
    assert script.caption(in_lab) == expected and no_complaint(in_lab), "and it goes on"


def test_the_demo_is_an_app(chromium: str, tmp_path: Path, expected: str) -> None:
    need("voila", importlib.util.find_spec("voila"))
    copy = Path(shutil.copy(APP, tmp_path))
    with script.voila(copy, tmp_path) as address, script.browser_page(chromium) as page:
        page.goto(address)
        page.locator(".capgen-go").wait_for()
        assert "import" not in page.locator("body").inner_text(), "an app shows no code"
        page.locator("select").first.select_option(label="hikers on dune")
        assert script.caption(page) == expected and no_complaint(page)
        assert script.step(page)[0] == expected.split()[1]


def test_the_kept_picture_is_small() -> None:
    assert script.PICTURE.stat().st_size < 250_000
    with Image.open(script.PICTURE) as picture:
        assert picture.format == "PNG" and picture.width >= 800


def test_a_copy_of_a_notebook_ends_where_it_shall(tmp_path: Path) -> None:
    import nbformat

    copy = nbformat.read(
        script.up_to(NOTEBOOK, "widgets.demo()", tmp_path / "a.ipynb"), as_version=4
    )
    assert "widgets.demo()" in copy.cells[-1].source and not any(
        cell.get("outputs") for cell in copy.cells
    )
    with pytest.raises(ValueError, match="no cell"):
        script.up_to(NOTEBOOK, "no such text", tmp_path / "b.ipynb")
