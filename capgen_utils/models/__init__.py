"""The captioners, one file each, and the registry that makes them by name."""

from collections.abc import Mapping
from typing import Any

from capgen_utils.config import TransformerConfig, from_dict
from capgen_utils.files import CapGenError
from capgen_utils.models.base import CaptionModel, Grouping, State
from capgen_utils.models.joint import JointCaptioner
from capgen_utils.models.transformer import TransformerCaptioner
from capgen_utils.text import Tokenizer

# Model name -> (class, class of its hyperparameters). A new captioner is one file and one line here.
MODELS: dict[str, tuple[type[CaptionModel], type]] = {
    TransformerCaptioner.name: (TransformerCaptioner, TransformerConfig),
}

__all__ = ["MODELS", "CaptionModel", "Grouping", "JointCaptioner", "State", "TransformerCaptioner", "build_model"]


def model_config(name: str, values: Mapping[str, Any]) -> Any:
    """Return the hyperparameters of model ``name`` from JSON values.

    Raises:
        CapGenError: no such model, or hyperparameters it does not have.
    """
    if name not in MODELS:
        raise CapGenError(f"there is no model {name!r}", f"choose one of {', '.join(MODELS)}")
    return from_dict(MODELS[name][1], values)


def build_model(name: str, config: Any, tokenizer: Tokenizer, feature_shape: tuple[int, ...]) -> CaptionModel:
    """Return an untrained captioner.

    Args:
        name: a key of ``MODELS``.
        config: its hyperparameters.
        tokenizer: of the captions it will say.
        feature_shape: of one image's features, such as (49, 1280).

    Raises:
        CapGenError: no such model, or hyperparameters that do not fit together.
    """
    if name not in MODELS:
        raise CapGenError(f"there is no model {name!r}", f"choose one of {', '.join(MODELS)}")
    unknown = getattr(tokenizer, "unk_id", tokenizer.pad_id)
    return MODELS[name][0](config, len(tokenizer), feature_shape, unknown)  # type: ignore[call-arg]
