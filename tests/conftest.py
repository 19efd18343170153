"""What all tests share: a private data folder, the real Flickr8k where there is one, and one
trained captioner."""

import functools
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers import ROOT, need

from capgen_utils.captioner import Captioner
from capgen_utils.data.datasets import load_dataset
from capgen_utils.models import MODELS
from capgen_utils.presets import PRESETS
from capgen_utils.training.shipped import take_shipped
from capgen_utils.vision.features import extract

__all__ = ["need"]

FULL_TRAINING = os.environ.get("CAPGEN_FULL_TRAINING") == "1"
TRAINING_LIMIT = 2400  # seconds for a test that may have to wait for the one training run


@pytest.fixture(scope="session", autouse=True)
def private_data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep every test away from the reader's data folder; parallel workers share one.

    CAPGEN_DATA_FOR_TESTS names a folder to use again, and with it a training run that is finished
    already.
    """
    given = os.environ.get("CAPGEN_DATA_FOR_TESTS")
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    base = tmp_path_factory.getbasetemp()
    folder = Path(given).resolve() if given else (base.parent if worker else base) / "capgen-data"
    folder.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("CAPGEN_DATA")
    os.environ["CAPGEN_DATA"] = str(folder)
    yield folder
    os.environ.pop("CAPGEN_DATA")
    if before is not None:
        os.environ["CAPGEN_DATA"] = before


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start every test from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def flickr8k() -> Path:
    """Return the folder of the real Flickr8k."""
    given = os.environ.get("CAPGEN_FLICKR8K", "")
    need("the real Flickr8k (CAPGEN_FLICKR8K names its folder)", given and Path(given).is_dir())
    return Path(given)


@dataclass(frozen=True)
class ShapesRun:
    """A finished run of ``capgen train --preset shapes --model MODEL``."""

    data: Path
    model: str = "transformer"

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.data / "runs" / f"shapes_{self.model}"

    @property
    def bundle(self) -> Path:
        """The trained captioner."""
        return self.folder / "bundle"

    @property
    def log(self) -> list[dict[str, Any]]:
        """One entry an epoch."""
        lines = (self.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


@functools.cache
def train_on_shapes(data: Path, model: str) -> ShapesRun:
    """Return the run of a shapes captioner: the one that ships.

    With ``CAPGEN_FULL_TRAINING=1`` it is trained once, by the real command line.
    """
    run = ShapesRun(data, model)
    with FileLock(data / "training.lock"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAPGEN_DATA", str(data))
        if FULL_TRAINING:
            train(data, "--model", model)
        else:  # with the features that training would leave
            take_shipped(PRESETS["shapes"])
            bundle = Captioner.from_bundle(run.bundle, "cpu").bundle
            encoder, dtype = bundle.build_encoder(), bundle.extraction_dtype
            extract(load_dataset("shapes"), encoder, bundle.model.feature, dtype=dtype)
    assert run.bundle.is_dir()
    return run


def train(data: Path, *options: str, anew: bool = True) -> str:
    """Run ``capgen train --preset shapes`` in a fresh process; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "capgen_utils", "train", "--preset", "shapes", *options],
        cwd=ROOT,
        env=os.environ | {"CAPGEN_DATA": str(data), "CAPGEN_TRAIN": str(int(anew))},
        capture_output=True,
        text=True,
        timeout=TRAINING_LIMIT,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def reader_data(private_data: Path) -> Path:
    """Return the data folder of the captioners; other tests train encoders in theirs."""
    folder = private_data / "reader"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def shapes_run(reader_data: Path) -> ShapesRun:
    """Return the trained transformer."""
    return train_on_shapes(reader_data, "transformer")


@pytest.fixture(scope="session", params=list(MODELS))
def any_shapes_run(request: pytest.FixtureRequest, reader_data: Path) -> ShapesRun:
    """Return each of the trained captioners."""
    return train_on_shapes(reader_data, request.param)


@pytest.fixture(scope="session")
def shapes_results(any_shapes_run: ShapesRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Score a shapes captioner on its test split by the real command line; returns the folder of
    the results."""
    output = tmp_path_factory.mktemp("results")
    command = [
        sys.executable,
        "-m",
        "capgen_utils",
        "evaluate",
        "--bundle",
        str(any_shapes_run.bundle),
    ]
    done = subprocess.run(
        [*command, "--output", str(output)],
        cwd=ROOT,
        env=os.environ | {"CAPGEN_DATA": str(any_shapes_run.data)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (output / "stdout.txt").write_text(done.stdout)
    return output


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests that may wait for the training run the time for it."""
    for item in items:
        if {"shapes_run", "any_shapes_run"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(TRAINING_LIMIT))
