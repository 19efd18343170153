"""Python, command line, service, page, exported graphs and demo give the same captions (fp32).

The captioner is the one that ships, the photographs are the samples, and nothing is decoded
otherwise than by default.
"""

import json
from collections.abc import Iterator
from importlib import util
from pathlib import Path

import httpx
import pytest
import torch
from browser_helpers import Visit, chromium
from helpers import PHOTOS, capgen, need
from serving_helpers import ServeProcess
from show_helpers import captions_of, upload

from capgen_utils.captioner import DEFAULT_BUNDLE, Captioner
from capgen_utils.decoding.captions import Caption
from capgen_utils.show import widgets

pytestmark = pytest.mark.slow
PATHS = sorted(PHOTOS.glob("*.jpg"))


@pytest.fixture(scope="module")
def expected() -> list[Caption]:
    """The captions of Python and of any notebook."""
    need("the trained captioner that ships", (DEFAULT_BUNDLE / "model.safetensors").is_file())
    assert len(PATHS) == 10
    return Captioner.from_bundle(device="cpu", fp32=True).caption(PATHS)


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    with ServeProcess("--fp32", "--device", "cpu") as process:
        yield process.address


def check(found: list[tuple[str, float]], expected: list[Caption]) -> None:
    """Compare captions, and log-probabilities within less than bf16 features change them."""
    assert [text for text, _ in found] == [caption.text for caption in expected]
    numbers = [caption.log_probability for caption in expected]
    assert [number for _, number in found] == pytest.approx(numbers, abs=1e-3)


def said_by(*arguments: str | Path) -> list[tuple[str, float]]:
    """Return the captions of the command line."""
    done = capgen("caption", *PATHS, "--json", *arguments)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["image"] for row in rows] == [str(path) for path in PATHS]
    return [(row["caption"], row["candidates"][0]["log_probability"]) for row in rows]


def test_features_in_bf16_would_be_noticed(
    expected: list[Caption], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capgen_utils.common.device.cpu_has_bf16", lambda: True)
    usual = Captioner.from_bundle(device="cpu")
    need("a captioner that was trained on features in bf16", usual.features_dtype == "bfloat16")
    with pytest.raises(AssertionError):
        check(
            [(caption.text, caption.log_probability) for caption in usual.caption(PATHS)], expected
        )


def test_the_command_line(expected: list[Caption]) -> None:
    check(said_by("--fp32", "--device", "cpu"), expected)


def test_the_exported_graphs(expected: list[Caption], tmp_path: Path) -> None:
    need(
        "onnx, onnxscript and onnxruntime",
        all(map(util.find_spec, ("onnx", "onnxscript", "onnxruntime"))),
    )
    done = capgen("export", "--format", "onnx", "--output", tmp_path / "exported")
    assert done.returncode == 0, done.stderr
    check(said_by("--onnx", tmp_path / "exported"), expected)


def test_the_service(expected: list[Caption], service: str) -> None:
    found = []
    for path in PATHS:
        answer = httpx.post(
            f"{service}/v1/captions", files={"image": path.read_bytes()}, timeout=100
        )
        assert answer.status_code == 200, answer.text
        found += [(one["caption"], one["log_probability"]) for one in answer.json()["captions"]]
    check(found, expected)


@pytest.mark.browser
def test_the_page(expected: list[Caption], service: str) -> None:
    with chromium() as browser, Visit(browser, service) as visit:
        visit.page.set_input_files("#files", [str(path) for path in PATHS])
        assert visit.captions(len(PATHS))[::-1] == [caption.text for caption in expected]


def test_the_demo(expected: list[Caption], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "capgen_utils.captioner.choose_device", lambda name="auto": torch.device("cpu")
    )
    demo = widgets.Demo({"shipped": DEFAULT_BUNDLE})
    upload(demo, *((path.name, path.read_bytes()) for path in PATHS))
    demo.fp32.value = True
    demo.button.click()
    assert captions_of(demo) == [caption.text for caption in expected], demo.status.value
