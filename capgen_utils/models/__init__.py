"""The captioners, one file each, and the registry that makes them by name (notebooks 03 to 07)."""

from collections.abc import Mapping
from typing import Any

from capgen_utils.common.files import CapGenError, from_dict
from capgen_utils.models.attend_tell import AttendTellCaptioner
from capgen_utils.models.base import IGNORED, CaptionModel, State, caption_loss
from capgen_utils.models.clip_gpt2 import ClipGpt2Captioner
from capgen_utils.models.clip_prefix import ClipPrefixCaptioner
from capgen_utils.models.show_tell import ShowTellCaptioner
from capgen_utils.models.transformer import TransformerCaptioner
from capgen_utils.text.words import Tokenizer

# A new captioner is one file (its hyperparameters, its class, its recipe) and one line here.
MODELS: dict[str, type[CaptionModel]] = {
    ShowTellCaptioner.name: ShowTellCaptioner,
    AttendTellCaptioner.name: AttendTellCaptioner,
    TransformerCaptioner.name: TransformerCaptioner,
    ClipPrefixCaptioner.name: ClipPrefixCaptioner,
    ClipGpt2Captioner.name: ClipGpt2Captioner,
}
__all__ = [
    "IGNORED",
    "MODELS",
    "CaptionModel",
    "State",
    "TransformerCaptioner",
    "build_model",
    "caption_loss",
    "model_class",
    "model_config",
]


def model_class(name: str) -> type[CaptionModel]:
    """Return the captioner's class.

    Raises:
        CapGenError: there is no such model; lists the models.
    """
    if name not in MODELS:
        raise CapGenError(f"there is no model {name!r}", f"choose one of {', '.join(MODELS)}")
    return MODELS[name]


def model_config(name: str, values: Mapping[str, Any]) -> Any:
    """Return the hyperparameters of model ``name`` from JSON values.

    Raises:
        CapGenError: there is no such model, or it has no such hyperparameter.
    """
    return from_dict(model_class(name).Config, values)


def build_model(
    name: str, config: Any, tokenizer: Tokenizer, feature_shape: tuple[int, ...]
) -> CaptionModel:
    """Return an untrained captioner.

    Args:
        name: a key of ``MODELS``.
        config: its hyperparameters.
        tokenizer: of the captions.
        feature_shape: of one image's features, such as (49, 1280).

    Raises:
        CapGenError: there is no such model, or its hyperparameters are inconsistent.
    """
    make: Any = model_class(name)
    unknown = getattr(tokenizer, "unk_id", tokenizer.pad_id)
    return make(config, len(tokenizer), feature_shape, unknown)
