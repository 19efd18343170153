"""CapGen: image captioning from scratch to CLIP + GPT-2, as a course that runs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capgen_utils.captioner import Captioner

__version__ = "0.1.0"
__all__ = ["Captioner", "__version__"]


def __getattr__(name: str) -> Any:
    """Import ``Captioner`` when it is first asked for: other parts are often wanted without the models."""
    if name == "Captioner":
        from capgen_utils.captioner import Captioner

        return Captioner
    raise AttributeError(f"module 'capgen_utils' has no attribute {name!r}")
