"""CapGen: image captioning from scratch to CLIP + GPT-2, as a course that runs.

The names below are the public face: notebooks and scripts import them from here. Each one is loaded
when it is first used, so that ``import capgen_utils`` stays fast and needs no torch.
"""

import importlib
from typing import Any

from capgen_utils.common import moved
from capgen_utils.common.machine import VERSION as __version__

moved.install()
_WHERE = {
    "Captioner": "captioner",
    "plots": "show.plots",
    "widgets": "show.widgets",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used."""
    if name not in _WHERE:
        raise AttributeError(f"module 'capgen_utils' has no attribute {name!r}")
    module = importlib.import_module(f"capgen_utils.{_WHERE[name]}")
    return module if _WHERE[name].endswith(name) else getattr(module, name)
