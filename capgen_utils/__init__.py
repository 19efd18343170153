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
    "BpeTokenizer": "text.bpe",
    "CapGenError": "common.files",
    "Captioner": "captioner",
    "ClipGpt2Captioner": "models.clip_gpt2",
    "ClipGpt2Config": "config",
    "ClipPrefixCaptioner": "models.clip_prefix",
    "ContrastiveTrainer": "training.clip",
    "DecodingConfig": "config",
    "IGNORED": "models",
    "Item": "data.manifest",
    "OnnxCaptioner": "apps.export.onnx_captioner",
    "Preprocessing": "vision.preprocessing",
    "REPOSITORY": "common.paths",
    "Reconstruction": "training.clip",
    "Specials": "decoding.captions",
    "TEMPERATURES": "decoding.options",
    "TrainingConfig": "config",
    "WordTokenizer": "text.words",
    "attention": "evaluation.attention",
    "baselines": "evaluation.baselines",
    "build_encoder": "vision.encoders",
    "build_model": "models",
    "caption_loss": "models",
    "caption_manifest": "decoding.run",
    "choose_device": "common.device",
    "choose_dtype": "common.device",
    "data_dir": "common.paths",
    "decode": "decoding.search",
    "decode_features": "decoding.run",
    "decode_manifest": "decoding.run",
    "describe": "decoding.options",
    "documents": "training.pretraining",
    "download_dataset": "data.datasets",
    "encode_images": "vision.features",
    "evaluate": "evaluation.results",
    "export_onnx": "apps.export.onnx_graphs",
    "extract": "vision.features",
    "get_preset": "presets",
    "gpt2_config": "models.clip_gpt2",
    "grounding": "evaluation.grounding",
    "hard_negatives": "text.twins",
    "image_key": "decoding.run",
    "import_torchvision": "common.hub",
    "info_nce": "training.clip",
    "initialise": "training.pretraining",
    "keep_top_k": "decoding.logits",
    "keep_top_p": "decoding.logits",
    "load_bundle": "bundle",
    "load_dataset": "data.datasets",
    "make_batch": "training.batches",
    "make_trainer": "training.recipes",
    "mean_features": "evaluation.scoring",
    "metrics": "evaluation.metrics",
    "open_bytes": "data.images",
    "open_image": "data.images",
    "penalise_repetition": "decoding.logits",
    "plots": "show.plots",
    "prepare": "training.recipes",
    "pretrain_encoder": "training.pretraining",
    "pretrain_language_model": "training.pretraining",
    "recall": "training.clip",
    "rerank": "decoding.rerank",
    "same_texts": "training.clip",
    "score": "evaluation.metrics",
    "shapes": "data.shapes",
    "tokenise": "text.ptb",
    "train": "training.recipes",
    "twin_accuracy": "training.clip",
    "widgets": "show.widgets",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used."""
    if name not in _WHERE:
        raise AttributeError(f"module 'capgen_utils' has no attribute {name!r}")
    module = importlib.import_module(f"capgen_utils.{_WHERE[name]}")
    return module if _WHERE[name].split(".")[-1] == name else getattr(module, name)
