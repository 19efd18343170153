"""Make ``import torchvision`` work beside a CPU build of torch.

The torchvision wheel on PyPI is built for CUDA. Beside a CPU-only torch its compiled part does not
load, and the import then dies on the missing operator ``torchvision::nms``, taking timm and
transformers with it. Declaring the operator's signature is enough for everything CapGen uses:
nothing here ever calls it.
"""

import importlib
import sys
from types import ModuleType

import torch

_MISSING_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


_libraries: list[
    torch.library.Library
] = []  # a declaration lives only as long as its Library object


def import_torchvision() -> ModuleType:
    """Import torchvision, declaring its missing operators first where the plain import fails.

    Call it before importing timm or anything else that imports torchvision.

    Returns:
        The ``torchvision`` module. ``torchvision.io`` and ``torchvision.ops.nms`` still do not run
        where the declaration was needed; images are decoded with Pillow instead.

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
