"""Where modules lay before: notebooks of earlier copies import the old paths.

They work for one release, with a warning that names the new place.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Old module -> the new one that holds most of its names.
_MODULES = {
    "attention": "evaluation.attention",
    "baselines": "evaluation.baselines",
    "batches": "training.batches",
    "bpe": "text.bpe",
    "captions": "decoding.captions",
    "checkpoint": "bundle",
    "compat": "common.hub",
    "contrastive": "training.clip",
    "cost": "evaluation.results",
    "datasets": "data.datasets",
    "doctor": "apps.cli.doctor",
    "dual_encoder": "vision.dual_encoder",
    "encoders": "vision.encoders",
    "features": "vision.features",
    "files": "common.files",
    "grounding": "evaluation.grounding",
    "hub": "common.hub",
    "images": "data.images",
    "language": "training.pretraining",
    "leaderboard": "evaluation.leaderboard",
    "logits": "decoding.logits",
    "machine": "common.machine",
    "metrics": "evaluation.metrics",
    "onnx_captioner": "apps.export.onnx_captioner",
    "onnx_export": "apps.export.onnx_graphs",
    "options": "decoding.options",
    "plots": "show.plots",
    "preprocessing": "vision.preprocessing",
    "pretraining": "training.pretraining",
    "recipes": "training.recipes",
    "rerank": "decoding.rerank",
    "results": "evaluation.results",
    "scenes": "data.shapes",
    "scoring": "evaluation.scoring",
    "shapes": "data.shapes",
    "shipping": "training.shipped",
    "tensors": "common.tensors",
    "treebank": "text.ptb",
    "twins": "text.twins",
    "widgets": "show.widgets",
    "widgets.parts": "show.widgets.parts",
}
# Names that went elsewhere than the rest of their module.
_NAMES = {
    "attention.grid_side": "vision.preprocessing",
    "attention.seen_box": "vision.preprocessing",
    "attention.upsample": "vision.preprocessing",
    "bpe.KINDS": "text.vocabulary",
    "bpe.fit_tokenizer": "text.vocabulary",
    "bpe.token_rows": "text.vocabulary",
    "bpe.tokenizer_from_json": "text.vocabulary",
    "checkpoint.load_checkpoint": "common.tensors",
    "checkpoint.save_checkpoint": "common.tensors",
    "config.APART": "common.paths",
    "config.choose_device": "common.device",
    "config.choose_dtype": "common.device",
    "config.cpu_has_bf16": "common.device",
    "config.data_dir": "common.paths",
    "config.from_dict": "common.files",
    "config.own_data_dir": "common.paths",
    "config.train_anew": "common.paths",
    "contrastive.pretrain_dual_encoder": "training.pretraining",
    "datasets.Item": "data.manifest",
    "datasets.Manifest": "data.manifest",
    "decoding.Hypothesis": "decoding.captions",
    "decoding.Specials": "decoding.captions",
    "decoding.Steps": "decoding.search",
    "decoding.TEMPERATURES": "decoding.options",
    "decoding.caption_manifest": "decoding.run",
    "decoding.check_decoding": "decoding.options",
    "decoding.decode": "decoding.search",
    "decoding.decode_features": "decoding.run",
    "decoding.decode_manifest": "decoding.run",
    "decoding.describe": "decoding.options",
    "decoding.image_key": "decoding.run",
    "decoding.with_options": "decoding.options",
    "decoding.word_attention": "decoding.run",
    "doctor.NO_KERNEL_REMEDY": "common.device",
    "doctor.check_device": "common.device",
    "doctor.device_remedy": "common.device",
    "encoders.ATTENTION": "vision.clip",
    "encoders.CLIPS": "vision.clip",
    "encoders.CLIP_PREPROCESSING": "vision.clip",
    "encoders.CLIP_REMEDY": "vision.clip",
    "encoders.ClipVision": "vision.clip",
    "encoders.Encoder": "vision.encoder",
    "encoders.Pixels": "vision.encoder",
    "encoders.Preprocessing": "vision.preprocessing",
    "encoders.as_picture": "vision.clip",
    "encoders.clip_vision": "vision.clip",
    "encoders.hash_tensors": "vision.encoder",
    "encoders.new_small_clip": "vision.clip",
    "encoders.published_clip": "vision.clip",
    "encoders.require_clip": "vision.clip",
    "encoders.small_clip": "vision.clip",
    "encoders.small_clip_config": "vision.clip",
    "encoders.small_vision_config": "vision.clip",
    "machine.REPOSITORY": "common.paths",
    "machine.device_name": "common.device",
    "machine.repository_address": "common.paths",
    "machine.requirement_lines": "common.paths",
    "recipes.pretrain_encoder": "training.pretraining",
    "shipping.main": "apps.authoring.ship",
    "shipping.ship": "apps.authoring.ship",
    "shipping.write_small": "apps.export.bundles",
    "text.Tokenizer": "text.words",
    "text.WordTokenizer": "text.words",
    "text.join_words": "text.ptb",
    "text.tokenise": "text.ptb",
    "training.DEV_PROTOCOL": "training.trainer",
    "training.Progress": "training.loop",
    "training.SAMPLES": "training.trainer",
    "training.Trainer": "training.trainer",
    "training.learning_rate": "training.loop",
    "training.make_optimizer": "training.loop",
}


def moved_names(module: str) -> Callable[[str], Any]:
    """Return a module's ``__getattr__``: it finds names where they are now, and warns."""
    old = module.removeprefix("capgen_utils.")

    def find(name: str) -> Any:
        target = _NAMES.get(f"{old}.{name}", _MODULES.get(old))
        if target is None or name.startswith("__"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new = f"capgen_utils.{target}"
        text = f"{module}.{name} is now {new}.{name}; the old name goes with the next release"
        warnings.warn(text, FutureWarning, stacklevel=2)
        return getattr(importlib.import_module(new), name)

    return find


class _OldModules(MetaPathFinder, Loader):
    """Makes an empty module for each old path; its names are looked up one by one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        old = fullname.removeprefix("capgen_utils.")
        known = fullname.startswith("capgen_utils.") and old in _MODULES
        return ModuleSpec(fullname, self, is_package=True) if known else None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = moved_names(module.__name__)  # type: ignore[method-assign]


def install() -> None:
    """Let the old paths be imported."""
    if not any(type(finder).__name__ == _OldModules.__name__ for finder in sys.meta_path):
        sys.meta_path.append(_OldModules())
