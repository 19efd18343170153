"""CapGen: image captioning from scratch to CLIP + GPT-2, as a course that runs.

The names below are the public face: notebooks and scripts import them from here. Each one is loaded
when it is first used, so that ``import capgen_utils`` stays fast and needs no torch.
"""

import importlib
from typing import Any

from capgen_utils.common import machine, moved

__version__ = machine.VERSION
moved.install()
_WHERE = {  # public name -> the module that holds it, or that it is
    "CapGenError": "common.files",
    "Captioner": "captioner",
    "DecodingConfig": "config",
    "Item": "data.manifest",
    "REPOSITORY": "common.paths",
    "Specials": "decoding.captions",
    "WordTokenizer": "text.words",
    "build_encoder": "vision.encoders",
    "build_model": "models",
    "caption_loss": "models",
    "choose_device": "common.device",
    "choose_dtype": "common.device",
    "data_dir": "common.paths",
    "decode_features": "decoding.run",
    "download_dataset": "data.datasets",
    "encode_images": "vision.features",
    "extract": "vision.features",
    "get_preset": "presets",
    "load_bundle": "bundle",
    "load_dataset": "data.datasets",
    "make_batch": "training.batches",
    "make_trainer": "training.recipes",
    "metrics": "evaluation.metrics",
    "open_image": "data.images",
    "plots": "show.plots",
    "prepare": "training.recipes",
    "pretrain_encoder": "training.encoder",
    "score": "evaluation.metrics",
    "shapes": "data.shapes",
    "tokenise": "text.ptb",
    "widgets": "show.widgets",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used."""
    if name not in _WHERE:
        raise AttributeError(f"module 'capgen_utils' has no attribute {name!r}")
    module = importlib.import_module(f"capgen_utils.{_WHERE[name]}")
    return module if _WHERE[name].split(".")[-1] == name else getattr(module, name)
