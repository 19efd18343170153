"""The captioners, one file each, and the registry that makes them by name."""

from collections.abc import Mapping
from typing import Any

from capgen_utils.common.files import CapGenError
from capgen_utils.config import (
    AttendTellConfig,
    ClipGpt2Config,
    ClipPrefixConfig,
    ShowTellConfig,
    TransformerConfig,
    from_dict,
)
from capgen_utils.models.attend_tell import AttendTellCaptioner
from capgen_utils.models.base import IGNORED, CaptionModel, Grouping, State, caption_loss
from capgen_utils.models.clip_gpt2 import ClipGpt2Captioner
from capgen_utils.models.clip_prefix import ClipPrefixCaptioner
from capgen_utils.models.show_tell import ShowTellCaptioner
from capgen_utils.models.transformer import TransformerCaptioner
from capgen_utils.text.words import Tokenizer

# Model name -> (class, class of its hyperparameters). A new captioner is one file and one line
# here.
MODELS: dict[str, tuple[type[CaptionModel], type]] = {
    ShowTellCaptioner.name: (ShowTellCaptioner, ShowTellConfig),
    AttendTellCaptioner.name: (AttendTellCaptioner, AttendTellConfig),
    TransformerCaptioner.name: (TransformerCaptioner, TransformerConfig),
    ClipPrefixCaptioner.name: (ClipPrefixCaptioner, ClipPrefixConfig),
    ClipGpt2Captioner.name: (ClipGpt2Captioner, ClipGpt2Config),
}


__all__ = [
    "IGNORED",
    "MODELS",
    "CaptionModel",
    "Grouping",
    "State",
    "TransformerCaptioner",
    "build_model",
    "caption_loss",
    "feature_of",
    "model_config",
]


def model_config(name: str, values: Mapping[str, Any]) -> Any:
    """Return the hyperparameters of model ``name`` from JSON values.

    Raises:
        CapGenError: no such model, or hyperparameters it does not have.
    """
    _model_class(name)
    return from_dict(MODELS[name][1], values)


def feature_of(name: str, config: Any) -> str:
    """Return the encoder output that model ``name`` with hyperparameters ``config`` reads.

    Raises:
        CapGenError: no such model.
    """
    return _model_class(name).feature_of(config)


def _model_class(name: str) -> type[CaptionModel]:
    if name not in MODELS:
        raise CapGenError(f"there is no model {name!r}", f"choose one of {', '.join(MODELS)}")
    return MODELS[name][0]


def build_model(
    name: str, config: Any, tokenizer: Tokenizer, feature_shape: tuple[int, ...]
) -> CaptionModel:
    """Return an untrained captioner.

    Args:
        name: a key of ``MODELS``.
        config: its hyperparameters.
        tokenizer: of the captions it will say.
        feature_shape: of one image's features, such as (49, 1280).

    Raises:
        CapGenError: no such model, or hyperparameters that do not fit together.
    """
    unknown = getattr(tokenizer, "unk_id", tokenizer.pad_id)
    return _model_class(name)(config, len(tokenizer), feature_shape, unknown)  # type: ignore[call-arg]
