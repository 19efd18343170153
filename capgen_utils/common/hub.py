"""Models of transformers by name on the hub, or from a folder in its layout (notebooks 06, 07)."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from capgen_utils.common.files import CapGenError

HUB_TIMEOUT = 5.0  # seconds until a hub that does not answer counts as unreachable
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# Older releases of transformers also stored constants, which it now computes itself.
_CONSTANTS = re.compile(r"(.*\.)?(attn\.bias|attn\.masked_bias|embeddings\.position_ids)")

_MISSING_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

# A declaration lives only as long as its Library object.
_libraries: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """Import torchvision, declaring its missing operators first if the plain import fails.

    Call it before importing timm or anything else that imports torchvision. The wheel on PyPI is
    built for CUDA. With a CPU-only torch its compiled part does not load, so the import fails on
    the missing operator ``torchvision::nms``, and with it timm and transformers. Declaring the
    operator's signature is enough, because CapGen never calls it.

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


def load_pretrained(kind: str, source: str | Path, remedy: str) -> Any:
    """Load a model strictly: all weights are present, of the right shape and finite; none is extra.

    A hub model is taken from the hub's cache. If it is not there, it is asked for once, without
    retries if the hub does not answer. ``HF_HUB_OFFLINE`` is respected. Safetensors are preferred;
    a ``.bin`` is read as tensors only, so that no file runs code.

    Args:
        kind: the name of a class of transformers, such as ``GPT2LMHeadModel``.
        source: name on the hub, or a local folder with ``config.json`` and the weights.
        remedy: the ways to provide such a model; the advice of every error.

    Returns:
        The model, fp32, in eval mode.

    Raises:
        CapGenError: there is no such model, or another one.
    """
    import_torchvision()
    network: Any = getattr(importlib.import_module("transformers"), kind)
    expected = network.config_class.model_type
    actual = read_config(source, remedy).get("model_type")
    if actual != expected:
        raise CapGenError(
            f"{source} holds a model of the type {actual!r}, not {expected!r}", remedy
        )
    load = partial(
        network.from_pretrained, str(source), output_loading_info=True, weights_only=True
    )
    with _explained(source, remedy), _quiet():
        try:
            model, report = load(local_files_only=True)
        except OSError:
            if Path(source).is_dir():
                raise
            _ask(str(source), "config.json")
            model, report = load()
    wrong = [*report["missing_keys"], *report["mismatched_keys"], *report["error_msgs"]]
    wrong += [key for key in report["unexpected_keys"] if not _CONSTANTS.fullmatch(key)]
    if wrong:
        raise CapGenError(
            f"the weights in {source} are not those of a {kind}: "
            + ", ".join(sorted(map(str, wrong))[:3]),
            remedy,
        )
    if not all(torch.isfinite(parameter).all() for parameter in model.parameters()):
        raise CapGenError(f"the weights in {source} are not all finite", remedy)
    return model.float().eval()


def read_config(source: str | Path, remedy: str) -> dict[str, Any]:
    """Return ``config.json`` of a model on the hub or in a local folder.

    Raises:
        CapGenError: the file is missing or does not describe a model.
    """
    folder = source != "" and Path(source).is_dir()
    if not folder and (isinstance(source, Path) or not _HUB_NAME.fullmatch(source)):
        raise CapGenError(
            f"{source} is neither an existing folder nor the name of a model on the hub", remedy
        )
    with _explained(source, remedy):
        path = Path(source) / "config.json" if folder else _fetch(str(source), "config.json")
        config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise CapGenError(f"{path} does not describe a model", remedy)
    return config


def _fetch(name: str, file: str) -> Path:
    """Return ``file`` of the hub model ``name``: from the hub's cache, else downloaded."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(name, file)
    if isinstance(cached, str):
        return Path(cached)
    _ask(name, file)
    return Path(hf_hub_download(name, file))


def _ask(name: str, file: str) -> None:
    """Ask the hub once for a file; a download would retry for half a minute without an answer."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    get_hf_file_metadata(hf_hub_url(name, file), timeout=HUB_TIMEOUT)


@contextmanager
def _explained(source: str | Path, remedy: str) -> Iterator[None]:
    """Turn every error of reading a model into one that names the ways to provide it."""
    try:
        yield
    except CapGenError:
        raise
    except Exception as error:  # of several libraries
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CapGenError(f"cannot load a model from {source}: {reason}", remedy) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from printing reports; problems become errors instead."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
