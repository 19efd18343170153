"""Make ``import torchvision`` work with a CPU build of torch.

The torchvision wheel on PyPI is built for CUDA. With a CPU-only torch its compiled part does not
load, so the import fails on the missing operator ``torchvision::nms``, and with it timm and
transformers. Declaring the operator's signature is enough, because CapGen never calls it.
"""

import importlib
import sys
from types import ModuleType

import torch

_MISSING_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

# A declaration lives only as long as its Library object.
_libraries: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """Import torchvision, declaring its missing operators first if the plain import fails.

    Call it before importing timm or anything else that imports torchvision.

    Returns:
        The ``torchvision`` module. If the declaration was needed, ``torchvision.io`` and
        ``torchvision.ops.nms`` do not run; images are decoded with Pillow instead.

    Raises:
        ImportError: torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # the failed import leaves half-made modules behind
    library = torch.library.Library("torchvision", "DEF")
    for signature in _MISSING_OPERATORS:
        library.define(signature)
    _libraries.append(library)
    return importlib.import_module("torchvision")
