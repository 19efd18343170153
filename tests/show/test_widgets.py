"""The widgets, driven from the kernel: uploads of both shapes, every way of decoding, errors shown
and not thrown."""

import io
import json
import re
from pathlib import Path
from typing import Any

import ipywidgets
import pytest
import torch
from helpers import (
    PHOTOS,
    save_tiny_bundle,
    tiny_dual,
    tiny_encoder,
    tiny_manifest,
    tiny_model,
    tiny_tokenizer,
)
from PIL import Image
from show_helpers import captions_of, upload

from capgen_utils.bundle import Bundle
from capgen_utils.captioner import DEFAULT_BUNDLE, Captioner
from capgen_utils.common.files import CapGenError
from capgen_utils.data.images import MAX_PIXELS, open_bytes
from capgen_utils.evaluation.attention import caption_maps, next_words
from capgen_utils.evaluation.metrics import score
from capgen_utils.show import widgets
from capgen_utils.show.widgets.app import MOST, NO_SAMPLE
from capgen_utils.show.widgets.parts import error_box, guarded, photograph, table

PHOTO = PHOTOS / "dog_panting.jpg"
CONTENT = PHOTO.read_bytes()


def tiny_captioner(
    model: str = "transformer", scorer: Any = None, dtype: str = "float32"
) -> Captioner:
    encoder, tokenizer = tiny_encoder(), tiny_tokenizer()
    decoding = {"beam": 2, "max_length": 6, "min_length": 2}
    info = {"extraction_dtype": dtype, "decoding": decoding, "encoder": encoder.describe()}
    bundle = Bundle(tiny_model(model, tokenizer), tokenizer, info)
    return Captioner(bundle, encoder, torch.device("cpu"), scorer)


def demo_of(**bundles: Any) -> widgets.Demo:
    return widgets.Demo(bundles or {"tiny": tiny_captioner()}, [PHOTO, PHOTOS / "cat_on_deck.jpg"])


# --- uploads


def test_both_shapes_of_an_upload_are_read() -> None:
    seven = {
        "b.jpg": {
            "metadata": {"name": "b.jpg", "type": "image/jpeg", "size": 3},
            "content": b"\0b\xff",
        },
        "a.jpg": {"metadata": {"name": "a.jpg"}, "content": b"aa"},
    }
    eight = (
        {
            "name": "b.jpg",
            "type": "image/jpeg",
            "size": 3,
            "content": memoryview(b"\0b\xff"),
            "last_modified": 0,
        },
        {"name": "a.jpg", "type": "", "size": 2, "content": memoryview(b"aa"), "last_modified": 0},
    )
    expected = [("b.jpg", b"\0b\xff"), ("a.jpg", b"aa")]
    assert (
        widgets.read_upload(seven)
        == widgets.read_upload(eight)
        == widgets.read_upload(list(eight))
        == expected
    )
    assert widgets.read_upload({}) == widgets.read_upload(()) == []
    assert widgets.read_upload(ipywidgets.FileUpload().value) == []


@pytest.mark.parametrize(
    "value", [None, 3, [b"bytes"], {"a.jpg": b"bytes"}, [{"name": "a.jpg"}], ({"content": b""},)]
)
def test_another_shape_is_named(value: Any) -> None:
    with pytest.raises(CapGenError, match="FileUpload"):
        widgets.read_upload(value)


def bomb() -> bytes:
    stream = io.BytesIO()
    Image.new("1", (MAX_PIXELS // 5000 + 1, 5000)).save(stream, "PNG")
    return stream.getvalue()


HOSTILE = {
    "empty": b"",
    "text": b"Dear captioner",
    "half": CONTENT[: len(CONTENT) // 2],
    "header": CONTENT[:20],
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n",
}


@pytest.mark.parametrize("name", [*HOSTILE, "bomb"])
def test_what_is_no_photograph_is_refused_by_name_and_the_others_are_captioned(name: str) -> None:
    content = bomb() if name == "bomb" else HOSTILE[name]
    assert len(content) < 1_000_000
    with pytest.raises(CapGenError, match=f"^{name}\\.jpg"):
        open_bytes(content, f"{name}.jpg")
    demo = demo_of()
    upload(demo, (f"{name}.jpg", content), ("good.jpg", CONTENT))
    demo.button.click()
    assert f"{name}.jpg" in demo.status.value and "capgen-error" in demo.status.value
    assert "0x" not in demo.status.value, "an address in memory tells a reader nothing"
    assert len(captions_of(demo)) == 1 and not demo.button.disabled


def test_an_upload_is_captioned_as_the_file_is() -> None:
    demo, captioner = demo_of(), tiny_captioner()
    upload(demo, ("dog.jpg", CONTENT), ("cat.jpg", (PHOTOS / "cat_on_deck.jpg").read_bytes()))
    demo.candidates.value = demo.beam.value = 2
    demo.button.click()
    expected = captioner.caption([PHOTO, PHOTOS / "cat_on_deck.jpg"], beam=2)
    assert captions_of(demo) == [caption.text for caption in expected]
    assert "2 photographs in" in demo.status.value and "capgen-error" not in demo.status.value
    listed = demo.results.children[0].children[1].value
    assert all("<td" in listed and candidate.text in listed for candidate in expected[0].candidates)
    assert f"{expected[0].log_probability:.2f}" in listed and "CLIP" not in listed


def test_a_turned_photograph_is_turned_back() -> None:
    note, stream = Image.Exif(), io.BytesIO()
    note[0x0112] = 6
    with Image.open(PHOTO) as photo:
        photo.rotate(90, expand=True).save(stream, "JPEG", exif=note, quality=95)
        assert open_bytes(stream.getvalue()).size == photo.size


def test_names_and_captions_are_text_and_never_markup() -> None:
    demo = demo_of()
    upload(
        demo, ("<script>alert(1)</script>.jpg", CONTENT), ("<img src=x onerror=alert(1)>", b"none")
    )
    demo.button.click()
    pages = [demo.status.value, *(child.value for child in demo.results.children[0].children[:2])]
    assert not any("<script" in page or "<img src=x" in page for page in pages)
    assert "&lt;img src=x" in demo.status.value
    assert "<b>" not in table(["<b>"], [["<b>"]]) and "<i>" not in error_box(ValueError("<i>"))
    assert '"><' not in photograph(Image.new("RGB", (4, 4)), '"><script>')


def test_too_many_at_once_are_refused_before_any_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = demo_of()
    monkeypatch.setattr(
        "capgen_utils.show.widgets.app.open_bytes", lambda *a: pytest.fail("opened")
    )
    upload(demo, *((f"{i}.jpg", CONTENT) for i in range(MOST + 1)))
    demo.button.click()
    assert f"{MOST + 1} photographs at once" in demo.status.value and not demo.results.children


# --- the demo


def test_without_a_photograph_the_demo_asks_for_one_and_old_results_are_gone() -> None:
    demo = demo_of()
    demo.sample.value = "dog panting"
    demo.button.click()
    assert captions_of(demo)
    demo.sample.value = NO_SAMPLE
    demo.button.click()
    assert "there is no photograph yet" in demo.status.value and not demo.results.children


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("greedy", {"beam": 1}),
        ("beam search", {"beam": 4}),
        ("draw", {"temperature": 0.5, "top_k": 7, "top_p": 0.8, "candidates": 3}),
    ],
)
def test_what_is_chosen_is_what_decodes(way: str, expected: dict[str, Any]) -> None:
    demo = demo_of()
    demo.way.value, demo.beam.value, demo.candidates.value = way, 4, 3
    demo.temperature.value, demo.top_k.value, demo.top_p.value = 0.5, 7, 0.8
    assert demo.options() == expected
    disabled = {
        name
        for name in ("beam", "candidates", "temperature", "top_k", "top_p")
        if getattr(demo, name).disabled
    }
    drawing = {"temperature", "top_k", "top_p"}
    assert (
        disabled
        == {"greedy": drawing | {"beam", "candidates"}, "beam search": drawing, "draw": {"beam"}}[
            way
        ]
    )
    demo.sample.value = "dog panting"
    demo.button.click()
    assert captions_of(demo) == [tiny_captioner().caption(PHOTO, **expected)[0].text]
    rows = demo.results.children[0].children[1].value.count("<tr>") - 1
    assert rows == (1 if way == "greedy" else 3)


def test_more_candidates_than_the_beam_widen_it() -> None:
    demo = demo_of()
    demo.beam.value, demo.candidates.value = 2, 5
    assert demo.options() == {"beam": 5}
    demo.top_p.value, demo.way.value = 1.0, "draw"
    assert demo.options() == {"temperature": 1.0, "top_k": None, "top_p": None, "candidates": 5}


def test_a_clip_scores_the_candidates_and_may_choose() -> None:
    scorer = tiny_dual()
    demo = demo_of(tiny=tiny_captioner(scorer=scorer))
    demo.sample.value, demo.way.value, demo.candidates.value = "dog panting", "draw", 6
    demo.button.click()
    (free,) = captions_of(demo)
    listed = demo.results.children[0].children[1].value
    scores = [float(value) for value in re.findall(r">(-?0\.\d{3})<", listed)]
    assert "CLIP (cosine)" in listed and len(scores) == 6
    demo.rerank.value = True
    demo.button.click()
    (chosen,) = captions_of(demo)
    again = [
        float(v) for v in re.findall(r">(-?0\.\d{3})<", demo.results.children[0].children[1].value)
    ]
    assert again == sorted(scores, reverse=True) and free, "CLIP's choice comes first"
    texts = tiny_captioner(scorer=scorer).caption(PHOTO, rerank=True, temperature=1.0, candidates=6)
    assert chosen == texts[0].text


def test_a_captioner_that_does_not_look_says_so_and_captions_all_the_same() -> None:
    demo = demo_of(blind=tiny_captioner("show_tell"))
    demo.sample.value = "dog panting"
    demo.button.click()
    card = demo.results.children[0]
    assert captions_of(demo)[0] and "show_tell has no attention" in card.children[2].value
    assert "capgen-error" not in demo.status.value


def test_captioners_are_loaded_when_they_are_needed_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_bundle(tmp_path / "b")
    loads = []
    load = Captioner.from_bundle
    monkeypatch.setattr(
        Captioner,
        "from_bundle",
        lambda path, fp32: loads.append(path) or load(path, "cpu", fp32=fp32),
    )
    demo = demo_of(first=tmp_path / "b", broken=tmp_path / "nothing")
    demo.sample.value = "dog panting"
    assert loads == []
    demo.button.click()
    demo.button.click()
    assert loads == [tmp_path / "b"] and captions_of(demo)
    demo.model.value = "broken"
    demo.button.click()
    assert (
        "capgen-error" in demo.status.value
        and "nothing" in demo.status.value
        and not demo.button.disabled
    )


def test_features_in_fp32_are_chosen_by_a_box_and_each_choice_is_loaded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capgen_utils.common.device.cpu_has_bf16", lambda: True)
    save_tiny_bundle(tmp_path)
    info = json.loads((tmp_path / "config.json").read_text()) | {"extraction_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(info))
    loads, load = [], Captioner.from_bundle
    monkeypatch.setattr(
        Captioner,
        "from_bundle",
        lambda path, fp32: loads.append(fp32) or load(path, "cpu", fp32=fp32),
    )
    demo = demo_of(bf16=tmp_path)
    demo.sample.value = "dog panting"
    listed = []
    for chosen in (False, True, False, True):
        demo.fp32.value = chosen
        demo.button.click()
        assert demo.captioner().features_dtype == ("float32" if chosen else "bfloat16")
        listed.append(demo.results.children[0].children[1].value)
    assert loads == [False, True] and listed[:2] == listed[2:] and listed[0] != listed[1]
    best = load(tmp_path, "cpu", fp32=True).caption(PHOTO, beam=5)[0]
    assert captions_of(demo) == [best.text] and f"{best.log_probability:.2f}" in listed[1]


def test_a_captioner_that_was_loaded_before_stays_as_it_is_and_the_box_says_how(
    tmp_path: Path,
) -> None:
    save_tiny_bundle(tmp_path)
    exact, half = tiny_captioner(), tiny_captioner(dtype="bfloat16")
    demo = demo_of(half=half, exact=exact, folder=tmp_path)
    boxes = {}
    for name in ("half", "exact", "folder"):
        demo.model.value = name
        boxes[name] = (demo.fp32.value, demo.fp32.disabled)
        assert name == "folder" or demo.captioner() is {"half": half, "exact": exact}[name]
    assert boxes == {"half": (False, True), "exact": (True, True), "folder": (False, False)}
    assert (half.features_dtype, exact.features_dtype) == ("bfloat16", "float32")


def test_what_nobody_expected_stands_in_the_widget_too(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = demo_of()
    monkeypatch.setattr(Captioner, "caption", lambda *a, **k: 1 / 0)
    demo.sample.value = "dog panting"
    demo.button.click()
    assert "ZeroDivisionError" in demo.status.value and "Traceback" not in demo.status.value
    assert not demo.button.disabled
    box = ipywidgets.HTML()
    with guarded(box), pytest.raises(KeyboardInterrupt), guarded(box):
        raise KeyboardInterrupt
    assert not box.value, "stopping a kernel is no error"


def test_bundles_are_found_where_they_ship_and_where_they_are_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPGEN_DATA", str(tmp_path))
    save_tiny_bundle(tmp_path / "runs" / "mine_transformer" / "bundle")
    (tmp_path / "runs" / "mine_transformer" / "checkpoint.safetensors").touch()
    shipped = next(name for name in widgets.find_bundles() if name.startswith("shapes_"))
    save_tiny_bundle(
        tmp_path / "runs" / shipped / "bundle"
    )  # as notebooks put it there that do not train
    found = widgets.find_bundles()
    assert (
        f"{shipped} (trained here)" not in found
        and found[shipped].parent != tmp_path / "runs" / shipped
    )
    assert (
        found["mine_transformer (trained here)"]
        == tmp_path / "runs" / "mine_transformer" / "bundle"
    )
    if (DEFAULT_BUNDLE / "config.json").is_file():
        assert next(iter(found.values())) == DEFAULT_BUNDLE
    empty = widgets.Demo({}, [PHOTO])
    assert "no trained captioner" in empty.status.value
    empty.sample.value = "dog panting"
    empty.button.click()
    assert "no trained captioner" in empty.status.value


# --- steps


@pytest.mark.parametrize("model", ["attend_tell", "transformer", "clip_gpt2"])
def test_the_slider_moves_the_map_and_the_probabilities(model: str) -> None:
    captioner = tiny_captioner(model)
    (maps,) = caption_maps(captioner, [PHOTO])
    likely = next_words(captioner, PHOTO, maps)
    steps = widgets.Steps(PHOTO, maps, likely)
    seen = []
    for place, text in enumerate(maps.texts):
        steps.slider.value = place
        assert f"<mark>{text}</mark>" in steps.sentence.value
        alt = re.findall(r'alt="([^"]*)"', steps.picture.value)[0]
        assert (
            f"for the word: {text}." in alt
            and f"{likely[place][0].text} {likely[place][0].probability:.0%}" in alt
        )
        seen.append(steps.picture.value)
    assert steps.slider.max == len(maps.words) - 1 and len(set(seen)) == len(seen)
    if model != "attend_tell":
        last = steps.picture.value
        steps.choice.value = "layer0 head1"
        assert "layer0 head1" in steps.picture.value and steps.picture.value != last


def test_next_words_are_the_captioners_probabilities() -> None:
    captioner = tiny_captioner()
    caption = captioner.caption(PHOTO, beam=1)[0]
    (maps,) = caption_maps(captioner, [PHOTO], beam=1)
    found = next_words(captioner, PHOTO, maps, count=5)
    said = [next(each for each in step if each.said) for step in found]
    assert [each.text for each in said] == list(caption.words)
    total = sum(float(torch.tensor(each.probability).log()) for each in said)
    assert total > caption.log_probability - 1e-3, "the end token is not among them"
    everything = next_words(captioner, PHOTO, maps, count=100)
    for step in everything:
        assert sum(each.probability for each in step) == pytest.approx(1, abs=1e-4)
        assert [e.probability for e in step] == sorted((e.probability for e in step), reverse=True)
    assert all(len(step) == 5 and sum(each.said for each in step) == 1 for step in found)
    (rare,) = caption_maps(captioner, [PHOTO], ["word11 word0"])
    assert all(
        any(each.said for each in step) for step in next_words(captioner, PHOTO, rare, count=1)
    )


def test_who_does_not_look_cannot_be_stepped_through() -> None:
    assert isinstance(widgets.step_through(tiny_captioner(), PHOTO, "word1 word2"), ipywidgets.VBox)
    with pytest.raises(CapGenError, match="no attention"):
        widgets.step_through(tiny_captioner("show_tell"), PHOTO)


# --- the dataset


def test_the_explorer_walks_through_splits_and_finds_words(tmp_path: Path) -> None:
    manifest = tiny_manifest(tmp_path, train=8, dev=3, test=3, ragged=False)
    explorer = widgets.Explorer(manifest)
    first = manifest.split("train").items[0]
    assert first.image in explorer.page.value and "1 of 8 images" in explorer.page.value
    assert all(caption in explorer.page.value for caption in first.captions)
    explorer.place.value = 7
    assert manifest.split("train").items[7].image in explorer.page.value
    explorer.split.value = "dev"
    assert "of 3 images" in explorer.page.value and explorer.place.max == 2
    explorer.split.value = "train"
    word = first.captions[0].split()[1]
    holders = [
        item
        for item in manifest.split("train").items
        if word in " ".join(item.captions).lower().split()
    ]
    explorer.words.value = word.upper()
    assert f"of {len(holders)} images" in explorer.page.value and len(holders) < 8
    explorer.words.value = "<b>elephant</b>"
    assert "no caption of train" in explorer.page.value and "<b>" not in explorer.page.value
    explorer.words.value = ""
    assert "of 8 images" in explorer.page.value


REFERENCES = {
    "a": ["a red dog runs", "the red dog runs fast"],
    "b": ["two cats sleep on a bed", "cats on the bed"],
    "c": ["a boat on water", "one boat sails"],
}


def test_captions_are_scored_beside_a_human_against_the_same_references() -> None:
    found = widgets.beside("a", {"you": "a red dog runs", "model": "water"}, REFERENCES)
    assert list(found) == ["you", "model", "a human"]
    chosen = {image: captions[0] for image, captions in REFERENCES.items()}
    others = {image: captions[1:] for image, captions in REFERENCES.items()}
    assert score({"a": chosen["a"]}, {"a": others["a"]})["ROUGE-L"] == pytest.approx(
        score({"a": "a red dog runs"}, {"a": others["a"]})["ROUGE-L"]
    )
    halves = [
        score({"a": "a red dog runs"}, {"a": [text]})["BLEU-1"] for text in REFERENCES["a"][::-1]
    ]
    assert found["you"]["BLEU-1"] == pytest.approx(sum(halves) / 2, abs=1e-4)
    assert found["model"]["CIDEr-D"] == 0 < found["a human"]["CIDEr-D"] < found["you"]["CIDEr-D"]
    with pytest.raises(CapGenError, match="no references of z"):
        widgets.beside("z", {}, REFERENCES)


def test_the_reader_is_scored_beside_the_model(tmp_path: Path) -> None:
    manifest = tiny_manifest(tmp_path, train=4, dev=2, test=4, ragged=False)
    game = widgets.BeatTheModel(tiny_captioner(scorer=tiny_dual()), manifest)
    item = manifest.split("test").items[0]
    assert game.image == item.image and item.captions[0] not in game.page.value, (
        "the references are not given away"
    )
    game.button.click()
    assert "no caption yet" in game.result.value
    game.typed.value = "x" * 301
    game.button.click()
    assert "longer than 300" in game.result.value
    game.typed.value = f"  {item.captions[0]} "
    game.button.click()
    page = game.result.value
    assert "You win by CIDEr-D. 1 of 1 rounds won." in page and "CLIP (cosine)" in page
    assert all(who in page for who in ("you", "the model", "a human")) and item.captions[1] in page
    game.another.click()
    assert (
        game.image == manifest.split("test").items[1].image
        and not game.typed.value
        and not game.result.value
    )
    game.typed.value = "<b>elephant</b>"
    game.button.click()
    assert "Not ahead" in game.result.value and "1 of 2 rounds" in game.result.value
    assert "<b>elephant" not in game.result.value
