"""A sixth captioner, one file and one line, trains, loads, decodes, is evaluated and served."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from serving_helpers import running

from capgen_utils import Captioner, train
from capgen_utils.apps.cli.main import main
from capgen_utils.apps.serve.served import Served
from capgen_utils.bundle import load_bundle
from capgen_utils.common.files import CapGenError
from capgen_utils.data import shapes
from capgen_utils.evaluation.attention import layer_attention
from capgen_utils.models import MODELS
from capgen_utils.presets import PRESETS, encoder_folder
from capgen_utils.training.recipes import Run
from capgen_utils.vision.encoders import new_shapes_cnn, save_encoder

SIXTH = '''
"""ResNet + GRU."""

from dataclasses import dataclass

import torch
from torch import nn

from capgen_utils.config import Recipe
from capgen_utils.models.base import CaptionModel, Memory, SharedState


@dataclass(frozen=True)
class GruConfig:
    seq_len: int = 26
    width: int = 32


@dataclass
class GruMemory(Memory):
    hidden: torch.Tensor  # (B, width)


class GruCaptioner(CaptionModel):
    name = "gru"
    feature = "grid"
    Config = GruConfig
    recipe = Recipe(GruConfig())

    def __init__(self, config, vocabulary_size, feature_shape, unk_id):
        super().__init__()
        self.config = config
        self.image = nn.Linear(feature_shape[-1], config.width)
        self.embedding = nn.Embedding(vocabulary_size, config.width)
        self.gru = nn.GRU(config.width, config.width, batch_first=True)
        self.output = nn.Linear(config.width, vocabulary_size)

    def encode(self, features):
        return GruMemory(torch.tanh(self.image(features.mean(1))))

    def forward(self, memory, tokens, image):
        x, _ = self.gru(self.embedding(tokens), memory.hidden[image][None])  # (M, T, width)
        return self.output(x)

    def start(self, memory):
        return SharedState.new(memory, memory.hidden[None])

    def step(self, tokens, state, attention=False):
        x, hidden = self.gru(self.embedding(tokens)[:, None], state.cache[0])  # (M, 1, width)
        return self.output(x[:, 0]), state.after(hidden), {}
'''


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 40 scenes."""
    folder = tmp_path_factory.mktemp("sixth") / "shapes"
    shapes.generate(folder, 40)
    return folder


@pytest.fixture(scope="module")
def run(scenes: Path) -> Iterator[Run]:
    """The sixth captioner in the registry, trained for one epoch."""
    file = scenes.parent / "gru.py"
    file.write_text(SIXTH)
    spec = importlib.util.spec_from_file_location("gru", file)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "gru", module)  # dataclasses look it up
        spec.loader.exec_module(module)
        patch.setitem(MODELS, module.GruCaptioner.name, module.GruCaptioner)
        patch.setenv("CAPGEN_DATA", str(scenes.parent / "data"))
        torch.manual_seed(0)
        save_encoder(encoder_folder(), new_shapes_cnn())
        yield train("gru", data=scenes, preset="shapes", epochs=2, batch_images=8, dtype="fp32")


def test_it_trains_with_its_own_recipe(run: Run) -> None:
    assert run.folder.name == "shapes_gru" and run.progress.done
    assert run.history[1]["train_loss"] < run.history[0]["train_loss"]
    assert run.trainer.config == replace(
        PRESETS["shapes"].training, epochs=2, batch_images=8, dtype="fp32"
    ), "a recipe without training settings takes the preset's"
    bundle = load_bundle(run.folder / "bundle")
    assert bundle.info["model"] == "gru" and bundle.info["architecture"]["width"] == 32


def test_a_finished_run_is_found_again(run: Run, scenes: Path) -> None:
    again = train("gru", data=scenes, preset="shapes", epochs=2, batch_images=8, dtype="fp32")
    assert again.history == run.history and again.progress.step == run.progress.step
    with pytest.raises(CapGenError, match="above zero"):
        train("gru", data=scenes, preset="shapes", epochs=0)
    with pytest.raises(CapGenError, match="seventh"):
        train("seventh", preset="shapes")


def test_it_captions_as_the_bundle_on_disk_does(run: Run, scenes: Path) -> None:
    photos = sorted(scenes.rglob("*.png"))[:4]
    captioner = Captioner.from_bundle(run.folder / "bundle", "cpu")
    for options in ({"beam": 1}, {"beam": 4, "candidates": 2}, {"temperature": 0.8, "seed": 3}):
        captions, expected = (c.caption(photos, **options) for c in (captioner, run.captioner))
        assert all(caption.tokens for caption in captions)
        assert [c.text for c in captions] == [c.text for c in expected]
    memory = captioner.model.encode(torch.zeros(1, *captioner.encoder.outputs["grid"]))
    assert layer_attention(captioner.model, memory, torch.tensor([[1, 5]])) == ([], [])


def test_it_is_evaluated(run: Run, scenes: Path, tmp_path: Path) -> None:
    command = ["evaluate", "--bundle", str(run.folder / "bundle"), "--data", str(scenes)]
    assert main([*command, "--output", str(tmp_path)]) == 0
    result = json.loads(next(tmp_path.glob("*gru.json")).read_text())
    assert result["model"] == "gru" and "BLEU-4" in result["scores"]


def test_it_is_served(run: Run, scenes: Path) -> None:
    photo = sorted(scenes.rglob("*.png"))[0]
    with running(Served.load("gru", run.folder / "bundle", device="cpu")) as (client, _):
        answer = client.post("/v1/captions", files={"image": photo.read_bytes()}).json()
        assert client.get("/v1/models").json()["models"][0]["kind"] == "gru"
    expected = Captioner.from_bundle(run.folder / "bundle", "cpu").caption(photo)[0]
    assert answer["captions"][0]["caption"] == expected.text
