"""Bundles: trained captioners on disk, as safetensors and JSON, never pickle (notebook 11)."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from capgen_utils.common.files import CapGenError, atomic_path, from_dict, read_json, write_json
from capgen_utils.common.tensors import compact, read_tensors, save_tensors
from capgen_utils.config import DecodingConfig
from capgen_utils.decoding.options import check_decoding
from capgen_utils.models import CaptionModel, build_model, model_config
from capgen_utils.text.vocabulary import tokenizer_from_json
from capgen_utils.text.words import Tokenizer
from capgen_utils.vision.clip import CLIPS
from capgen_utils.vision.dual_encoder import DualEncoder
from capgen_utils.vision.encoder import Encoder
from capgen_utils.vision.encoders import restore_encoder, save_encoder
from capgen_utils.vision.preprocessing import preprocessing_from_json

VERSION = 1
GET_AGAIN = "copy the whole bundle folder again, or train again with this version (capgen train)"


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Bundle:
    """A trained captioner with everything it needs to caption a photograph.

    Attributes:
        model: in eval mode, fp32.
        tokenizer: of its captions.
        info: ``config.json``: model, preset, encoder, extraction dtype, decoding defaults, metrics,
            revision.
        folder: the folder it was read from; ``None`` for a captioner that was just trained.
        encoder_weights: a local weights file of the encoder, or folder of a published CLIP, if
            they cannot be downloaded.
    """

    model: CaptionModel
    tokenizer: Tokenizer
    info: dict[str, Any]
    folder: Path | None = None
    encoder_weights: Path | None = None

    @property
    def decoding(self) -> DecodingConfig:
        """The decoding defaults that are stored with the weights."""
        return from_dict(DecodingConfig, self.info["decoding"])

    @property
    def extraction_dtype(self) -> torch.dtype:
        """The dtype of the training features, used for new photographs as well."""
        return _DTYPES[self.info["extraction_dtype"]]

    def build_encoder(self) -> Encoder:
        """Return the encoder the captioner was trained on, with the stored preprocessing.

        Raises:
            CapGenError: its weights are not available, or are not those of training.
        """
        stored = self.folder and self.folder / "encoder"
        return restore_encoder(self.info["encoder"], stored, self.encoder_weights)

    def build_scorer(self) -> DualEncoder | None:
        """Return the CLIP that re-ranks captions: from the bundle, or its published encoder.

        Returns:
            ``None`` if the bundle has none.

        Raises:
            CapGenError: it is damaged, or its weights are not available.
        """
        stored = scorer_folder(self.folder) if self.folder is not None else None
        if stored is not None:
            return DualEncoder.load(stored, self.encoder_weights)
        name = self.info["encoder"]["name"]
        return DualEncoder.published(name, self.encoder_weights) if name in CLIPS else None


def scorer_folder(folder: Path) -> Path | None:
    """Return the folder of the CLIP in the bundle ``folder``, if it has one."""
    if (folder / "scorer").is_dir():
        return folder / "scorer"
    return folder / "encoder" if (folder / "encoder" / "text.safetensors").is_file() else None


def save_bundle(
    folder: Path,
    bundle: Bundle,
    encoder: Encoder | None = None,
    dtype: torch.dtype = torch.float16,
    scorer: DualEncoder | None = None,
) -> None:
    """Write ``bundle`` as a folder in one atomic step.

    Args:
        folder: replaced if it exists.
        bundle: its weights are stored in ``dtype``, or in fewer bits where that is lossless.
        encoder: stored too unless it is public.
        dtype: of the stored weights.
        scorer: a CLIP that re-ranks captions, stored too; in place of ``encoder`` if that is its
            image half.
    """
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        tensors = {k: v.detach().to("cpu", dtype) for k, v in bundle.model.state_dict().items()}
        save_tensors(temporary / "model.safetensors", compact(tensors))
        write_json(temporary / "tokenizer.json", bundle.tokenizer.to_json())
        write_json(temporary / "config.json", {"version": VERSION, **bundle.info})
        both = scorer is not None and scorer.images is encoder
        if scorer is not None and not (both and scorer.images.public):
            scorer.save(temporary / ("encoder" if both else "scorer"))
        if encoder is not None and not encoder.public and not both:
            save_encoder(temporary / "encoder", encoder)


def bundle_info(
    model_name: str,
    model: CaptionModel,
    encoder: Encoder,
    extraction_dtype: torch.dtype,
    decoding: DecodingConfig,
    preset: str,
    **more: Any,
) -> dict[str, Any]:
    """Return the contents of a bundle's ``config.json``; ``more`` is added to it."""
    output = model.feature
    return {
        "model": model_name,
        "architecture": asdict(model.config),
        "feature": {"output": output, "shape": list(encoder.outputs[output])},
        "encoder": encoder.describe(),
        "extraction_dtype": str(extraction_dtype).removeprefix("torch."),
        "decoding": decoding.to_json(),
        "preset": preset,
        **more,
    }


def load_bundle(folder: Path, encoder_weights: Path | None = None) -> Bundle:
    """Load a bundle. It is data, never code: names, shapes, sizes and types are checked before use.

    Args:
        folder: written by ``save_bundle``.
        encoder_weights: a local weights file of the encoder, or folder of a published CLIP, if
            they cannot be downloaded.

    Raises:
        CapGenError: a file is missing, damaged, of another version, or does not fit the others.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CapGenError(
            f"there is no bundle folder {folder}", "check the path, or train one: capgen train"
        )
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise CapGenError(f"the bundle {folder} has no {name}", GET_AGAIN)
    info = read_json(folder / "config.json", GET_AGAIN)
    _check_info(info, folder)
    tokenizer = tokenizer_from_json(read_json(folder / "tokenizer.json", GET_AGAIN))
    name, shape = info["model"], tuple(info["feature"]["shape"])
    try:
        with torch.device("meta"):  # shapes first: a bundle that does not fit allocates nothing
            model = build_model(name, model_config(name, info["architecture"]), tokenizer, shape)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CapGenError(
            f"{folder}/config.json: its values do not fit together ({error})", GET_AGAIN
        ) from error
    if info["feature"].get("output") != model.feature:
        raise CapGenError(
            f"{folder}/config.json: a {name} reads the output {model.feature!r}", GET_AGAIN
        )
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    tensors = read_tensors(folder / "model.safetensors", shapes, GET_AGAIN)
    model.load_state_dict({k: v.float() for k, v in tensors.items()}, assign=True)
    return Bundle(model.eval().requires_grad_(False), tokenizer, info, folder, encoder_weights)


_KINDS: dict[str, type] = {
    "model": str,
    "architecture": dict,
    "feature": dict,
    "encoder": dict,
    "extraction_dtype": str,
    "decoding": dict,
}


def _check_info(info: Any, folder: Path) -> None:
    version = info.get("version") if isinstance(info, dict) else None
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        raise CapGenError(
            f"the bundle {folder} has format version {version}, this CapGen reads {VERSION}",
            "update CapGen (git pull, pip install -e .)" if newer else GET_AGAIN,
        )
    for key, kind in _KINDS.items():
        if not isinstance(info.get(key), kind):
            raise CapGenError(
                f"{folder}/config.json: {key} is missing or is not a {kind.__name__}", GET_AGAIN
            )
    shape, encoder = info["feature"].get("shape"), info["encoder"]
    sizes = shape if isinstance(shape, list) else [0]
    architecture = asdict(model_config(info["model"], info["architecture"]))
    limits = {"d_model": 4096, "fc_dim": 16384, "n_decode": 64, "n_head": 256, "seq_len": 1024}
    limits |= {"n_embd": 8192, "n_layer": 128, "n_positions": 2**16, "reduction": 1024}
    possible = (
        all(isinstance(n, int) and 0 < n <= 10**5 for n in sizes)
        and info["extraction_dtype"] in _DTYPES
        and all(isinstance(encoder.get(key), str) for key in ("name", "weights_hash"))
        and isinstance(encoder.get("preprocessing"), dict)
        and all(0 < architecture.get(key, 1) <= limit for key, limit in limits.items())
        and isinstance(info.get("preset"), str | None)
        and isinstance(info.get("training"), dict | None)
    )
    if not possible:
        raise CapGenError(f"{folder}/config.json holds impossible values", GET_AGAIN)
    preprocessing_from_json(encoder["preprocessing"])
    try:
        check_decoding(from_dict(DecodingConfig, info["decoding"]))
    except CapGenError as error:
        raise CapGenError(
            f"{folder}/config.json: its decoding defaults: {error.problem}", GET_AGAIN
        ) from error
