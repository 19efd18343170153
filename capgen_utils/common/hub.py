"""Models of the transformers library by their name on the hub, or from a local folder in the hub's
layout."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from capgen_utils.common.files import CapGenError

HUB_TIMEOUT = 5.0  # seconds until a hub that does not answer counts as out of reach
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


# What older releases of the library wrote beside the weights: constants that it makes itself.
_CONSTANTS = re.compile(r"(.*\.)?(attn\.bias|attn\.masked_bias|embeddings\.position_ids)")


def load_pretrained(kind: type, source: str | Path, remedy: str) -> Any:
    """Load a model strictly: every weight is there, has its shape and is finite, and nothing is
    left over.

    A hub model is taken from the hub's cache; what is not there is asked for once, without retries
    where nobody answers. ``HF_HUB_OFFLINE`` is respected. Safetensors are preferred; a ``.bin`` is
    read as tensors only, so that no file runs code.

    Args:
        kind: class of the transformers library, such as ``GPT2LMHeadModel``.
        source: name on the hub, or a local folder with ``config.json`` and the weights.
        remedy: the ways to provide such a model; the advice of every error.

    Returns:
        The model, fp32, in eval mode.

    Raises:
        CapGenError: nothing is there, or something else.
    """
    import torch  # here, because tables of tokens are fetched without torch

    from capgen_utils.common.compat import import_torchvision

    import_torchvision()
    expected = kind.config_class.model_type  # type: ignore[attr-defined]
    found = read_config(source, remedy).get("model_type")
    if found != expected:
        raise CapGenError(f"{source} holds a model of the type {found!r}, not {expected!r}", remedy)
    with _explained(source, remedy), _quiet():
        try:
            model, report = _load(kind, source, local=True)
        except OSError:
            if _is_folder(source):
                raise
            _ask(str(source))
            model, report = _load(kind, source, local=False)
    wrong = [*report["missing_keys"], *report["mismatched_keys"], *report["error_msgs"]]
    wrong += [key for key in report["unexpected_keys"] if not _CONSTANTS.fullmatch(key)]
    if wrong:
        named = ", ".join(str(key) for key in sorted(wrong, key=str)[:3])
        raise CapGenError(
            f"the weights in {source} are not those of a {kind.__name__}: {named}", remedy
        )
    if not all(torch.isfinite(parameter).all() for parameter in model.parameters()):
        raise CapGenError(f"the weights in {source} are not all finite", remedy)
    return model.float().eval()


def _load(kind: Any, source: str | Path, local: bool) -> tuple[Any, dict[str, Any]]:
    return kind.from_pretrained(  # type: ignore[no-any-return]
        str(source), local_files_only=local, output_loading_info=True, weights_only=True
    )


def read_config(source: str | Path, remedy: str) -> dict[str, Any]:
    """Return ``config.json`` of a model on the hub or in a local folder.

    Raises:
        CapGenError: there is none, or it is none of a model.
    """
    folder = _is_folder(source)
    if not folder and (isinstance(source, Path) or not _HUB_NAME.fullmatch(source)):
        raise CapGenError(
            f"{source} is neither an existing folder nor the name of a model on the hub", remedy
        )
    with _explained(source, remedy):
        path = Path(source) / "config.json" if folder else fetch(str(source), "config.json")
        config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise CapGenError(f"{path} does not describe a model", remedy)
    return config


def _is_folder(source: str | Path) -> bool:
    return source != "" and Path(source).is_dir()


def fetch(name: str, file: str) -> Path:
    """Return ``file`` of the hub model ``name``: from the hub's cache, else downloaded.

    Raises:
        Exception: the client's errors, which come from several libraries; quickly where nobody
            answers.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(name, file)
    if isinstance(cached, str):
        return Path(cached)
    _ask(name, file)
    return Path(hf_hub_download(name, file))


def _ask(name: str, file: str = "config.json") -> None:
    """Ask the hub once whether it has the model: a download would ask for half a minute where
    nobody answers."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    get_hf_file_metadata(hf_hub_url(name, file), timeout=HUB_TIMEOUT)


@contextmanager
def _explained(source: str | Path, remedy: str) -> Iterator[None]:
    """Turn whatever reading a model raises into an error that names the ways to provide it."""
    try:
        yield
    except CapGenError:
        raise
    except Exception as error:  # the library's errors come from several libraries
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CapGenError(f"cannot load a model from {source}: {reason}", remedy) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library from printing reports: what is wrong becomes an error."""
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
