"""Small real things that tests are made of: images on disk, an encoder, a captioner, a training
run."""

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from capgen_utils import models
from capgen_utils.bundle import Bundle, bundle_info, save_bundle
from capgen_utils.config import DecodingConfig, SmallClipConfig, TrainingConfig, TransformerConfig
from capgen_utils.data.manifest import Item, Manifest
from capgen_utils.text.words import Tokenizer, WordTokenizer
from capgen_utils.training.batches import TrainingData
from capgen_utils.training.trainer import Trainer
from capgen_utils.vision.dual_encoder import DualEncoder
from capgen_utils.vision.encoder import Encoder
from capgen_utils.vision.encoders import new_shapes_cnn
from capgen_utils.vision.features import extract
from capgen_utils.vision.preprocessing import Preprocessing

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT / "data" / "photos"
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (40, 60, 220),
    "white": (240, 240, 240),
}
PLACES = ("left", "right", "top", "bottom")
CPU = torch.device("cpu")


def need(name: str, available: object) -> None:
    """Skip a test that lacks ``name``; where CAPGEN_STRICT=1 the lack is a failure."""
    if available:
        return
    if os.environ.get("CAPGEN_STRICT") == "1":
        pytest.fail(f"{name} is missing, and CAPGEN_STRICT=1 allows no skip")
    pytest.skip(f"needs {name}")


@functools.cache
def repository_files() -> tuple[Path, ...]:
    """Files that are tracked, or new and not ignored; all files where this is no clone."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    if (ROOT / ".git").exists() and shutil.which("git"):
        listed = (
            subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
            .stdout.decode()
            .split("\0")
        )
        paths = [ROOT / name for name in listed if name]
    else:
        written = re.compile(
            r"(^|/)(\.(?!ci/|gitignore$)|__pycache__/|[^/]*\.egg-info/|build/|course-output/|runs/)"
        )
        paths = [p for p in ROOT.rglob("*") if not written.search(p.relative_to(ROOT).as_posix())]
    return tuple(sorted(path for path in paths if path.is_file()))


def run_python(*arguments: str, cwd: Path | None = None, timeout: float = 300, **env: str) -> Any:
    """Run Python in a fresh process with one thread; the tests' folder and the package can be
    imported."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    full = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | env
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=full, capture_output=True, text=True, timeout=timeout, check=False
    )


def capgen(*arguments: str | Path, cwd: Path | None = None, **env: str) -> Any:
    """Run the command line in a fresh process."""
    return run_python("-m", "capgen_utils", *map(str, arguments), cwd=cwd, **env)


# --- images


def load_benchmark(name: str) -> ModuleType:
    """Import a script of benchmarks/."""
    spec = importlib.util.spec_from_file_location(
        f"bench_{name}", ROOT / "benchmarks" / f"{name}.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"bench_{name}"] = module
    spec.loader.exec_module(module)
    return module


def two_tone(first: str, second: str, place: str, size: int = 24) -> Image.Image:
    """Return a square of ``first`` with a bar of ``second`` at ``place``."""
    pixels = np.empty((size, size, 3), dtype=np.uint8)
    pixels[:] = COLOURS[first]
    half = size // 3
    rows, columns = slice(None), slice(None)
    if place in ("top", "bottom"):
        rows = slice(0, half) if place == "top" else slice(size - half, None)
    else:
        columns = slice(0, half) if place == "left" else slice(size - half, None)
    pixels[rows, columns] = COLOURS[second]
    return Image.fromarray(pixels)


def combinations() -> list[tuple[str, str, str]]:
    """Return every (ground, bar, place) in an order that mixes them."""
    found = [(a, b, p) for p in PLACES for a in COLOURS for b in COLOURS if a != b]
    order = np.random.default_rng(0).permutation(len(found))
    return [found[i] for i in order]


def tiny_manifest(
    folder: Path, train: int = 12, dev: int = 4, test: int = 0, ragged: bool = True
) -> Manifest:
    """Write small images with captions; captions per image vary from 1 to 3 where ``ragged``."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = ["train"] * train + ["dev"] * dev + ["test"] * test
    items = []
    for number, (split, (ground, bar, place)) in enumerate(
        zip(splits, combinations(), strict=False)
    ):
        name = f"{number:03d}.png"
        if not (folder / name).exists():  # a second process may be reading it
            two_tone(ground, bar, place).save(folder / name)
        captions = [
            f"A {bar} bar at the {place} of a {ground} square .",
            f"{ground} with {bar}",
            f"there is a {bar} bar on {ground} , at the very far {place}",
        ]
        items.append(Item(name, split, tuple(captions[: 1 + number % 3] if ragged else captions)))
    return Manifest("tiny", folder, tuple(items))


# --- an encoder and captioners


def tiny_encoder(width: int = 12, size: int = 24, seed: int = 0) -> Encoder:
    """Return a random encoder with a BatchNorm: (24, 24) pixels -> 9 vectors of ``width``."""
    generator = torch.Generator().manual_seed(seed)
    trunk = nn.Sequential(
        nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, width, 2, stride=2)
    )
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        trunk[1].running_mean.copy_(torch.randn(8, generator=generator) * 0.1)
    preprocessing = Preprocessing(size=size, mean=(0.5,) * 3, std=(0.5,) * 3)
    cells = (size // 8) ** 2
    return Encoder("tiny", trunk, preprocessing, {"grid": (cells, width), "pooled": (width,)})


TINY_SIZES: dict[str, Any] = {
    "img_size": 24,
    "seq_len": 16,
    "d_model": 32,
    "n_decode": 2,
    "n_head": 4,
    "fc_dim": 64,
    "dropout": 0.0,
    "word_dropout": 0.0,
    "embed_size": 32,
    "hidden_size": 32,
    "attention_size": 16,
    "num_layers": 2,
    "tower_layers": 2,
    "tower_width": 32,
    "tower_heads": 4,
    "tower_positions": 20,
    "n_embd": 32,
    "n_layer": 2,
    "n_positions": 20,
}


# Ways to build a captioner that differ in more than size: name -> (model, hyperparameters).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "show_tell, pooled": ("show_tell", {"image": "pooled"}),
    "clip_prefix, tower": ("clip_prefix", {"text_inputs": "tower"}),
    "clip_gpt2, no gate": (
        "clip_gpt2",
        {"gate": False, "reduction": 2, "image_positions": True, "gradient_checkpointing": True},
    ),
}


def tiny_config(model: str = "transformer", **changes: Any) -> Any:
    """Return small hyperparameters of any registered model or variant: those of ``TINY_SIZES`` that
    it has."""
    model, own = VARIANTS.get(model, (model, {}))
    changes = own | changes
    kind = models.MODELS[model].Config
    known = {field.name for field in fields(kind)}
    return kind(**{k: v for k, v in (TINY_SIZES | changes).items() if k in known})


def tiny_tokenizer(words: int = 12) -> WordTokenizer:
    """Return a vocabulary of ``words`` words."""
    return WordTokenizer([f"word{i}" for i in range(words)])


def tiny_shape(model: str) -> tuple[int, ...]:
    """Return the shape of one image's features that a registered model or variant reads: a grid or
    a vector."""
    return (
        (9, 12)
        if models.MODELS[VARIANTS.get(model, (model,))[0]].feature_of(tiny_config(model)) == "grid"
        else (12,)
    )


def tiny_model(
    model: str = "transformer",
    tokenizer: Tokenizer | None = None,
    shape: tuple[int, ...] | None = None,
    **changes: Any,
) -> models.CaptionModel:
    """Return a small random captioner in eval mode, fp32."""
    torch.manual_seed(7)
    config, name = tiny_config(model, **changes), VARIANTS.get(model, (model,))[0]
    built = models.build_model(
        name, config, tokenizer or tiny_tokenizer(), shape or tiny_shape(model)
    ).eval()
    with torch.no_grad():  # what it says depends on the image more than on chance alone
        for name, parameter in built.named_parameters():
            if ("cross" in name or "projection" in name) and name.endswith("weight"):
                parameter.mul_(4)
            elif name == "norm.weight":
                parameter.mul_(3)
            elif name.endswith(
                ("wte.weight", "wpe.weight", "head.weight")
            ):  # GPT-2 begins with small numbers
                parameter.mul_(10)
            elif name.endswith(".gate"):  # and looks at no image at first
                parameter.fill_(1.0)
    return built


def save_tiny_bundle(
    folder: Path, decoding: DecodingConfig | None = None, **changes: Any
) -> Bundle:
    """Write a bundle with random weights, and the small private encoder of ``shapes`` in it."""
    torch.manual_seed(3)
    encoder = new_shapes_cnn(32)
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer=tokenizer, shape=encoder.outputs["grid"], **changes)
    decoding = decoding or DecodingConfig(beam=2, max_length=8)
    info = bundle_info("transformer", model, encoder, torch.float32, decoding, "shapes")
    bundle = Bundle(model, tokenizer, info)
    save_bundle(folder, bundle, encoder)
    return bundle


TINY_CLIP = SmallClipConfig(
    embed_size=24,
    vision_width=32,
    vision_layers=2,
    vision_heads=4,
    text_width=16,
    text_layers=2,
    text_heads=2,
    seq_len=12,
)


def tiny_dual(
    stem: Encoder | None = None,
    tokenizer: Tokenizer | None = None,
    sizes: SmallClipConfig = TINY_CLIP,
) -> DualEncoder:
    """Return a random small CLIP whose numbers differ from image to image and from text to text."""
    torch.manual_seed(5)
    return DualEncoder.new(sizes, stem or new_shapes_cnn(32), tokenizer or tiny_tokenizer())


# --- training


def tiny_data(
    folder: Path, flip: bool = False, **manifest: Any
) -> tuple[TrainingData, Encoder, WordTokenizer]:
    """Write images and features below ``folder``."""
    whole = tiny_manifest(folder / "images", **manifest)
    encoder, train = tiny_encoder(), whole.split("train")
    options: dict[str, Any] = {"folder": folder / "features", "dtype": torch.float32, "device": CPU}
    flipped = extract(train, encoder, flip=True, **options) if flip else None
    data = TrainingData(train, whole.split("dev"), extract(whole, encoder, **options), flipped)
    return data, encoder, WordTokenizer.fit(train.captions(), 1)


def tiny_trainer(
    folder: Path,
    run: Path | None = None,
    flip: bool = False,
    model: dict[str, Any] | None = None,
    images: dict[str, Any] | None = None,
    trackers: Sequence[str] = (),
    **training: Any,
) -> Trainer:
    """Return the trainer of a small captioner; data lies in ``folder``, the run in ``run``."""
    data, encoder, tokenizer = tiny_data(folder, flip, **(images or {}))
    values = {
        "epochs": 3,
        "batch_images": 4,
        "learning_rate": 3e-3,
        "seed": 5,
        "dtype": "fp32",
    } | training
    config = TrainingConfig(**values)
    torch.manual_seed(config.seed)
    captioner = models.build_model(
        "transformer", tiny_config(**(model or {})), tokenizer, encoder.outputs["grid"]
    )
    decoding = DecodingConfig(beam=2, max_length=12)
    return Trainer(
        captioner,
        tokenizer,
        data,
        encoder,
        config,
        decoding,
        run or folder / "run",
        "shapes",
        torch.float32,
        trackers,
        CPU,
    )


def architecture(config: TransformerConfig) -> dict[str, Any]:
    """Return a configuration as a bundle stores it."""
    return asdict(config)


# --- processes that are killed


def start_script(
    what: str, folder: Path, stderr: int = subprocess.PIPE, **options: Any
) -> "subprocess.Popen[str]":
    """Start ``killed.py`` in a process of its own."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        str(ROOT / "tests" / "killed.py"),
        what,
        str(folder),
        json.dumps(options),
    ]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True)


def run_and_kill(what: str, folder: Path, count: int = 1, **options: Any) -> None:
    """Start ``killed.py`` and kill it without warning when it has said ``now`` ``count`` times."""
    process = start_script(what, folder, subprocess.STDOUT, **options)
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            count -= line.rstrip().endswith("now")  # a progress bar may stand before it
            if not count:
                break
        assert count == 0, f"ended before the moment came: {''.join(lines)[-3000:]}"
    finally:
        process.kill()
        process.communicate()


def run_script(what: str, folder: Path, **options: Any) -> str:
    """Run ``killed.py`` to its end and return what it printed last."""
    process = start_script(what, folder, **options)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out.strip().splitlines()[-1]
