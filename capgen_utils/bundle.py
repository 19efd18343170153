"""Bundles (what is used) and training checkpoints (what is resumed): safetensors and JSON, never
pickle."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from capgen_utils.common.files import CapGenError, atomic_path, read_json, write_json
from capgen_utils.common.tensors import compact, read_tensors, save_tensors
from capgen_utils.config import DecodingConfig, from_dict
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


@dataclass
class Bundle:
    """A trained captioner with everything it needs to caption a photograph.

    Attributes:
        model: in eval mode, fp32.
        tokenizer: of its captions.
        info: ``config.json``: model, preset, encoder, extraction dtype, decoding defaults, metrics,
            revision.
        folder: where it was read from; ``None`` for one that was just trained.
    """

    model: CaptionModel
    tokenizer: Tokenizer
    info: dict[str, Any]
    folder: Path | None = field(default=None)

    @property
    def decoding(self) -> DecodingConfig:
        """The decoding defaults that were stored with the weights."""
        return from_dict(DecodingConfig, self.info["decoding"])

    @property
    def extraction_dtype(self) -> torch.dtype:
        """The dtype that the training features were computed in; used again on fresh photographs."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
            self.info["extraction_dtype"]
        ]

    def build_encoder(self, weights: Path | None = None) -> Encoder:
        """Return the encoder the captioner was trained on, with the stored preprocessing.

        Raises:
            CapGenError: its weights cannot be had, or are other ones than those of training.
        """
        own = self.folder / "encoder" if self.folder else None
        return restore_encoder(self.info["encoder"], own, weights)

    def build_scorer(self, weights: Path | None = None) -> DualEncoder | None:
        """Return the CLIP that chooses among captions: from the bundle, or the published one of its
        encoder.

        Args:
            weights: a local weights file of the CLIP's stem, or folder of a published CLIP.

        Returns:
            ``None`` where the bundle has none.

        Raises:
            CapGenError: it is damaged, or its weights cannot be had.
        """
        own = scorer_folder(self.folder) if self.folder is not None else None
        if own is not None:
            return DualEncoder.load(own, weights)
        name = self.info["encoder"]["name"]
        return DualEncoder.published(name, weights) if name in CLIPS else None


def scorer_folder(folder: Path) -> Path | None:
    """Return where the bundle in ``folder`` keeps the CLIP that chooses among captions, if it holds
    one."""
    if (folder / "scorer").is_dir():
        return folder / "scorer"
    return folder / "encoder" if (folder / "encoder" / "text.safetensors").is_file() else None


def require_scorer(
    bundle: Bundle, folder: Path | None = None, weights: Path | None = None
) -> DualEncoder:
    """Return the CLIP in ``folder``, else the bundle's own.

    Args:
        bundle: a captioner.
        folder: what ``DualEncoder.save`` wrote.
        weights: as in ``Bundle.build_scorer``.

    Raises:
        CapGenError: there is none, or it cannot be loaded.
    """
    scorer = (
        DualEncoder.load(folder, weights) if folder is not None else bundle.build_scorer(weights)
    )
    if scorer is None:
        raise CapGenError(
            "this bundle holds no CLIP that could choose among captions",
            "train a small one (capgen pretrain) and name its folder: scorer=FOLDER, --scorer FOLDER",
        )
    return scorer


def save_bundle(
    folder: Path,
    bundle: Bundle,
    encoder: Encoder | None = None,
    dtype: torch.dtype = torch.float16,
    scorer: DualEncoder | None = None,
) -> None:
    """Write ``bundle`` as a folder in one atomic step.

    Args:
        folder: replaced when it exists.
        bundle: what to write; weights are stored in ``dtype``, or in less where nothing is lost by
            it.
        encoder: stored too when it is not public.
        scorer: a CLIP that chooses among captions, stored too; where ``encoder`` is its image half,
            in its place.
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
    """Return what ``config.json`` says of a captioner."""
    output = model.feature
    return {
        "model": model_name,
        "architecture": asdict(model.config),
        "feature": {"output": output, "shape": list(encoder.outputs[output])},
        "encoder": encoder.describe(),
        "extraction_dtype": str(extraction_dtype).removeprefix("torch."),
        "decoding": asdict(decoding),
        "preset": preset,
        **more,
    }


def load_bundle(folder: Path) -> Bundle:
    """Load a bundle. It is data, never code: names, shapes, sizes and types are checked before use.

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
    config = model_config(info["model"], info["architecture"])
    try:
        with torch.device(
            "meta"
        ):  # shapes first: nothing is allocated for a bundle that does not fit
            model = build_model(info["model"], config, tokenizer, tuple(info["feature"]["shape"]))
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CapGenError(
            f"{folder}/config.json: its values do not fit together ({error})", GET_AGAIN
        ) from error
    if info["feature"].get("output") != model.feature:
        raise CapGenError(
            f"{folder}/config.json: a {info['model']} reads the output {model.feature!r}", GET_AGAIN
        )
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    tensors = read_tensors(folder / "model.safetensors", shapes, GET_AGAIN)
    model.load_state_dict({k: v.float() for k, v in tensors.items()}, assign=True)
    return Bundle(model.eval().requires_grad_(False), tokenizer, info, folder)


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
        raise CapGenError(
            f"the bundle {folder} is of version {version}, this CapGen reads version {VERSION}",
            GET_AGAIN,
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
        and info["extraction_dtype"] in ("float32", "bfloat16", "float16")
        and all(isinstance(encoder.get(key), str) for key in ("name", "weights_hash"))
        and isinstance(encoder.get("preprocessing"), dict)
        and all(0 < architecture.get(key, 1) <= limit for key, limit in limits.items())
        and isinstance(info.get("preset"), str | None)
        and isinstance(info.get("training"), dict | None)
    )
    if not possible:
        raise CapGenError(f"{folder}/config.json holds values that are not possible", GET_AGAIN)
    preprocessing_from_json(encoder["preprocessing"])
    try:
        check_decoding(from_dict(DecodingConfig, info["decoding"]))
    except CapGenError as error:
        raise CapGenError(
            f"{folder}/config.json: its decoding defaults: {error.problem}", GET_AGAIN
        ) from error
