"""The folders in which training keeps its results (notebook 00)."""

from pathlib import Path

from capgen_utils.common.paths import data_dir
from capgen_utils.presets import Preset


def run_of(preset: Preset, model: str) -> Path:
    """Return the run folder of a preset's captioner."""
    return data_dir() / "runs" / f"{preset.name}_{model}"


def encoder_folder() -> Path:
    """Return the folder of the encoder that is pre-trained for ``shapes``."""
    return data_dir() / "encoders" / "shapes_cnn"


def dual_encoder_folder(preset: Preset, judge: bool = False) -> Path:
    """Return the folder of a preset's small CLIP, or of the one that only measures."""
    return data_dir() / "encoders" / f"{preset.name}_{'judge' if judge else 'clip'}"


def mini_folder(preset: Preset) -> Path:
    """Return the folder of a preset's language model."""
    return data_dir() / "language_models" / f"{preset.name}_gpt2_mini"


def run_folder(folder: Path) -> Path:
    """Return where the training of the network in ``folder`` keeps its log and its checkpoint."""
    return folder.parent / f"{folder.name}-run"
