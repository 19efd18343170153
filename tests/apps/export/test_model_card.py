"""A bundle for the hub: the card agrees with its files, and nothing is uploaded unasked."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import PHOTOS, need, save_tiny_bundle

from capgen_utils import Captioner
from capgen_utils.apps.cli.main import main
from capgen_utils.apps.export import bundles
from capgen_utils.apps.export.bundles import bundle_facts
from capgen_utils.captioner import DEFAULT_BUNDLE
from capgen_utils.common import paths
from capgen_utils.common.files import CapGenError


def metadata_of(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def tiny_bundle(folder: Path, **info: Any) -> Path:
    save_tiny_bundle(folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | info))
    return folder


def test_the_shipped_captioner_has_a_card_with_its_own_figures(tmp_path: Path) -> None:
    need("the trained captioner that ships", (DEFAULT_BUNDLE / "model.safetensors").is_file())
    assert main(["export", "--format", "hub", "--output", str(tmp_path / "hub")]) == 0
    card = (tmp_path / "hub" / "README.md").read_text(encoding="utf-8")
    facts = bundle_facts(DEFAULT_BUNDLE)
    assert f"{facts['parameters']:,} parameters" in card
    assert f"| BLEU-4 | {facts['dev']['BLEU-4']:.2f} |" in card and facts["dev"]["protocol"] in card
    assert "research and teaching" in card and facts["encoder"]["weights_hash"] in card
    values = metadata_of(card)
    assert (
        values["pipeline_tag"] == "image-to-text"
        and values["license"] == "other"
        and values["language"] == "en"
    )
    (result,) = values["model-index"][0]["results"]
    assert result["dataset"] == {"name": "flickr8k", "type": "flickr8k", "split": "dev"}
    measured = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert measured["BLEU-4"] == round(facts["dev"]["BLEU-4"], 2) and "dev_loss" not in measured
    for name in facts["files"]:
        assert (tmp_path / "hub" / name).read_bytes() == (DEFAULT_BUNDLE / name).read_bytes()


def test_the_folder_is_a_bundle_with_all_its_parts(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", dataset="shapes")
    (bundle / "notes.txt").write_text("mine")
    (bundle / "link.json").symlink_to(bundle / "config.json")
    bundles.export_hub(bundle, tmp_path / "hub")
    files = {
        path.relative_to(tmp_path / "hub").as_posix()
        for path in (tmp_path / "hub").rglob("*")
        if path.is_file()
    }
    parts = {"config.json", "tokenizer.json", "model.safetensors"}
    assert files == parts | {"README.md", "encoder/config.json", "encoder/model.safetensors"}
    photo = next(iter(sorted(PHOTOS.glob("*.jpg"))))
    said = [
        Captioner.from_bundle(folder).caption(photo)[0].text
        for folder in (bundle, tmp_path / "hub")
    ]
    assert said[0] == said[1]
    card = (tmp_path / "hub" / "README.md").read_text(encoding="utf-8")
    assert metadata_of(card)["license"] == "mit" and "drawn by the package itself" in card
    assert "model-index" not in metadata_of(card) and "None are recorded" in card


def test_a_bundle_from_elsewhere_does_not_write_the_card(tmp_path: Path) -> None:
    evil = "x|y\n---\nlicense: evil\n# <script>alert(1)</script> [a](http://b) `c`"
    bundle = tiny_bundle(
        tmp_path / "bundle",
        dataset=evil,
        revision=evil,
        dev={"BLEU-4": 1.5, evil: 2.0, "protocol": evil, "n": "3"},
        training_run={"epochs": evil},
    )
    card = bundles.model_card(bundle_facts(bundle))
    body = card.split("---\n", 2)[2]
    assert metadata_of(card)["license"] == "other"
    assert (
        "<script" not in body.replace("\\<", "")
        and "\n# \\<" not in body
        and "license: evil" not in body.split("\n")
    )
    assert [line for line in body.split("\n") if line.startswith("# ")] == [body.split("\n")[1]]


def test_a_damaged_bundle_has_no_card(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    (bundle / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CapGenError):
        bundles.export_hub(bundle, tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize(
    ("name", "env", "problem"),
    [
        ("no-owner", {}, "no name"),
        ("a/../b", {}, "no name"),
        ("me/mine", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
        ("me/mine", {}, "no token"),
    ],
)
def test_an_impossible_push_is_refused_before_anything_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    env: dict[str, str],
    problem: str,
) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    asked = [
        "export",
        "--format",
        "hub",
        "--bundle",
        str(bundle),
        "--output",
        str(tmp_path / "hub"),
        "--push",
        name,
    ]
    assert main(asked) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "hub").exists()


class Hub:
    """Stands in for the hub's client."""

    def __init__(self, fails: bool) -> None:
        self.fails, self.asked = fails, list[tuple[str, Any]]()

    def create_repo(self, name: str, **options: Any) -> str:
        if self.fails:
            raise ConnectionError("nobody answers")
        self.asked.append((name, options))
        return f"https://hub.example/{name}"

    def upload_folder(self, **options: Any) -> None:
        self.asked.append(("upload", options))


@pytest.mark.parametrize("fails", [False, True])
def test_pushing_makes_a_private_model_or_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    hub = Hub(fails)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    if fails:
        with pytest.raises(CapGenError, match="nobody answers"):
            bundles.push(tmp_path, "me/mine")
        return
    assert bundles.push(tmp_path, "me/mine") == "https://hub.example/me/mine"
    assert hub.asked[0] == ("me/mine", {"exist_ok": True, "private": True})
    assert hub.asked[1][1]["folder_path"] == tmp_path


def test_the_address_is_the_projects(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    address = paths.repository_address()
    assert address.startswith("https://github.com/")
    monkeypatch.setattr(paths, "REPOSITORY", tmp_path)
    assert paths.repository_address() == address, "installed without the clone"
