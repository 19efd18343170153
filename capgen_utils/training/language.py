"""The weights that CLIP + GPT-2 starts from: a published GPT-2, or ``gpt2-mini``, pre-trained here
on the captions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch import Tensor, nn

from capgen_utils.common.compat import import_torchvision
from capgen_utils.common.files import CapGenError, atomic_path, read_json, write_json
from capgen_utils.common.hub import load_pretrained, read_config
from capgen_utils.common.paths import data_dir
from capgen_utils.common.tensors import save_tensors
from capgen_utils.config import ClipGpt2Config
from capgen_utils.data.datasets import load_dataset
from capgen_utils.data.manifest import Manifest
from capgen_utils.models import CaptionModel
from capgen_utils.models.base import IGNORED, Memory
from capgen_utils.models.clip_gpt2 import ClipGpt2Captioner, Gpt2Decoder, gpt2_config
from capgen_utils.presets import Preset
from capgen_utils.text.vocabulary import fit_tokenizer, token_rows, tokenizer_from_json
from capgen_utils.text.words import Tokenizer
from capgen_utils.training.batches import TrainingData
from capgen_utils.training.trainer import Trainer
from capgen_utils.vision.encoder import Encoder
from capgen_utils.vision.features import FeatureCache
from capgen_utils.vision.preprocessing import Preprocessing

MINI = "gpt2-mini"


WAYS = (
    "provide a GPT-2 in one of three ways: (1) connect to the network once, so that the hub model can be fetched; "
    "(2) name a local folder in the hub's layout (config.json and model.safetensors) as language_model; "
    f"(3) set language_model to {MINI}, which is pre-trained here on the training captions"
)


SIZES = ("n_embd", "n_layer", "n_head", "n_positions")


# How GPT-2 is run here; a checkpoint that asks for something else is another model.
_FORM = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


# --- from a folder or the hub into the captioner


def with_sizes_of(config: ClipGpt2Config, source: str | Path) -> ClipGpt2Config:
    """Return ``config`` with the sizes of the GPT-2 in ``source``; it may keep fewer positions.

    Raises:
        CapGenError: there is no GPT-2 in ``source``; names the three ways to provide one.
    """
    found = read_config(source, WAYS)
    sizes: dict[str, Any] = {key: found.get(key) for key in SIZES}
    if not all(type(value) is int and value > 0 for value in sizes.values()):
        raise CapGenError(f"the config.json of {source} is not that of a GPT-2", WAYS)
    sizes["n_positions"] = min(config.n_positions, sizes["n_positions"])
    return replace(config, **sizes)


def load_language_model(
    captioner: ClipGpt2Captioner, source: str | Path, original_ids: Sequence[int] | None = None
) -> None:
    """Copy the weights of a published or local GPT-2 into ``captioner``; an untied head starts as
    its embedding.

    Args:
        captioner: of the same sizes; it may have fewer positions.
        source: name on the hub, such as ``gpt2`` or ``distilgpt2``, or a local folder in the hub's
            layout.
        original_ids: for each of the captioner's tokens its row in the embedding of ``source``;
            ``None``: the same.

    Raises:
        CapGenError: there is no GPT-2 in ``source``, or another one; names the three ways to
            provide one.
    """
    import_torchvision()
    from transformers import GPT2LMHeadModel

    model = load_pretrained(GPT2LMHeadModel, source, WAYS)
    _check_form(model.config, captioner.config, source)
    weights = model.transformer.state_dict()
    rows = _rows(weights["wte.weight"], original_ids, len(captioner.output_bias), source)
    weights["wte.weight"] = rows
    weights["wpe.weight"] = weights["wpe.weight"][: captioner.config.n_positions]
    captioner.gpt2.load_state_dict(weights)
    captioner.start_head()


def _check_form(found: Any, config: ClipGpt2Config, source: str | Path) -> None:
    wanted = _FORM | {key: getattr(config, key) for key in SIZES}
    odd = [key for key, value in wanted.items() if getattr(found, key, value) != value]
    if "n_positions" in odd and found.n_positions > config.n_positions:
        odd.remove("n_positions")
    if found.n_inner not in (None, 4 * config.n_embd):
        odd.append("n_inner")
    if odd:
        values = ", ".join(f"{key} {getattr(found, key)}" for key in odd)
        raise CapGenError(f"the GPT-2 in {source} is not the captioner's: it has {values}", WAYS)


def _rows(table: Tensor, ids: Sequence[int] | None, count: int, source: str | Path) -> Tensor:
    """Return the rows ``ids`` of the embedding ``table``, which must be ``count`` rows."""
    ids = range(len(table)) if ids is None else ids
    if len(ids) != count or not all(0 <= i < len(table) for i in ids):
        raise CapGenError(
            f"the vocabulary of {source} ({len(table)} tokens) is not that of the captioner", WAYS
        )
    return table[torch.tensor(ids)]


def fit_config(config: Any) -> Any:
    """Return a captioner's hyperparameters, with the sizes of the published GPT-2 where they name
    one."""
    source = getattr(config, "language_model", MINI)
    return config if source == MINI else with_sizes_of(config, source)


def initialise(
    model: CaptionModel, preset: Preset, tokenizer: Tokenizer, root: Path | None = None
) -> None:
    """Give a new captioner the language model that it starts from; others are left as they are.

    Args:
        model: freshly built.
        preset: where the captions come from that ``gpt2-mini`` is pre-trained on, once.
        tokenizer: of the captioner.
        root: folder of the dataset, where it is not in its usual place.

    Raises:
        CapGenError: the language model cannot be had, or does not fit.
    """
    if not isinstance(model, ClipGpt2Captioner):
        return
    source = model.config.language_model
    if source != MINI:
        load_language_model(model, source, getattr(tokenizer, "original_ids", None))
        return
    folder = pretrain_language_model(preset, root)
    kept = tokenizer_from_json(read_json(folder / "tokenizer.json", _make_again(folder)))
    rows = token_rows(kept, tokenizer)
    if rows is None:
        raise CapGenError(
            f"the language model in {folder} was trained on another vocabulary", _make_again(folder)
        )
    load_language_model(model, folder, rows)


def _make_again(folder: Path) -> str:
    return f"delete {folder} and {run_folder(folder)}: the next training makes them anew"


# --- gpt2-mini


@dataclass
class NoImage(Memory):
    """What a language model remembers of B images: (B, 0)."""

    nothing: Tensor


class LanguageModel(Gpt2Decoder):
    """GPT-2 that learns captions without their images; the epoch with the lowest dev loss is the
    best.

    It reads all captions of an image as one document. A caption alone gives self-attention little
    to look for; the second caption of a document is half told by the first, and whoever wants to
    foretell it has to look up what was said of which thing. That is what the frozen layers will be
    needed for.
    """

    name = MINI
    feature = "nothing"
    select_by_loss = True
    chunks = 1

    def encode(self, features: Tensor) -> NoImage:
        """(B, 0) -> the same."""
        return NoImage(features)

    def loss(
        self,
        memory: Any,
        tokens: Tensor,
        image: Tensor,
        targets: Tensor,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Cross-entropy of documents; see ``CaptionModel.loss``. A document ends where GPT-2's
        positions do."""
        tokens, targets = documents(tokens, targets, image, self.training)
        tokens, targets = (
            tokens[:, : self.config.n_positions],
            targets[:, : self.config.n_positions],
        )
        return super().loss(
            memory,
            tokens,
            torch.arange(len(tokens), device=tokens.device),
            targets,
            label_smoothing,
        )


def documents(
    tokens: Tensor, targets: Tensor, image: Tensor, shuffle: bool
) -> tuple[Tensor, Tensor]:
    """Lay the captions of each image end to end.

    Args:
        tokens, targets: (M, T), what each position reads and what follows it; ``IGNORED`` where
            nothing does.
        image: (M,), the image of each caption.
        shuffle: in any order; else as they come.

    Returns:
        The same for images: (I, T'), I of them having captions.
    """
    real = targets != IGNORED
    parts = []
    for i in image.unique().tolist():
        rows = (image == i).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows)).to(rows.device)] if shuffle else rows
        parts.append(
            [torch.cat([values[row, real[row]] for row in rows]) for values in (tokens, targets)]
        )
    inputs, wanted = zip(*parts, strict=True)
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(list(inputs), batch_first=True), pad(
        list(wanted), batch_first=True, padding_value=IGNORED
    )


def mini_folder(preset: Preset) -> Path:
    """Return where the language model of a preset is kept."""
    return data_dir() / "language_models" / f"{preset.name}_gpt2_mini"


def run_folder(folder: Path) -> Path:
    """Return where the training of the language model in ``folder`` keeps its log and its
    checkpoint."""
    return folder.parent / f"{folder.name}-run"


def pretrain_language_model(
    preset: Preset, root: Path | None = None, folder: Path | None = None
) -> Path:
    """Train a small GPT-2 on the preset's training captions, once; later calls find it. Chance is
    left as it was.

    Args:
        preset: its recipe of ``clip_gpt2`` holds the sizes, ``language`` the training.
        root: folder of the dataset, where it is not in its usual place.
        folder: instead of ``mini_folder(preset)``.

    Returns:
        The folder, in the hub's layout (the library's ``GPT2LMHeadModel.from_pretrained`` reads
        it), with ``tokenizer.json`` as in a bundle.

    Raises:
        CapGenError: the preset starts from a published GPT-2, or the folder holds one of other
            sizes.
    """
    recipe = preset.recipe(ClipGpt2Captioner.name)
    config, folder = recipe.config, folder or mini_folder(preset)
    if config.language_model != MINI:
        raise CapGenError(
            f"the preset {preset.name} starts from {config.language_model}",
            "go on with: capgen train",
        )
    if (folder / "model.safetensors").is_file():
        _check_sizes(read_config(folder, _make_again(folder)), config, folder)
        return folder
    if PartialState().is_main_process:
        print(f"pre-training {MINI} once on the captions; it is kept in {folder}")
    manifest = load_dataset(preset.dataset, root)
    tokenizer = fit_tokenizer(
        recipe.tokenizer, manifest.split("train").captions(), preset.min_count
    )
    with torch.random.fork_rng():
        torch.manual_seed(preset.language.seed)
        trainer = _trainer(config, tokenizer, manifest, preset, run_folder(folder))
        trainer.train()
    if PartialState().is_main_process:
        _save_as_hub(
            folder, config, tokenizer, load_file(trainer.folder / "bundle" / "model.safetensors")
        )
    PartialState().wait_for_everyone()
    return folder


def _check_sizes(found: Mapping[str, Any], config: ClipGpt2Config, folder: Path) -> None:
    odd = [key for key in SIZES if found.get(key) != getattr(config, key)]
    if odd:
        raise CapGenError(
            f"the language model in {folder} has another {odd[0]}", _make_again(folder)
        )


def _trainer(
    config: ClipGpt2Config, tokenizer: Tokenizer, manifest: Manifest, preset: Preset, run: Path
) -> Trainer:
    model = LanguageModel(config, len(tokenizer), getattr(tokenizer, "unk_id", tokenizer.pad_id))
    names = tuple(item.image for item in manifest.items)
    nothing = FeatureCache(Path("nothing"), names, np.zeros((len(names), 0), np.float16), {})
    data = TrainingData(manifest.split("train"), manifest.split("dev"), nothing)
    blind = Encoder("none", nn.Identity(), Preprocessing(), {LanguageModel.feature: (0,)})
    return Trainer(
        MINI,
        model,
        tokenizer,
        data,
        blind,
        preset.language,
        preset.decoding,
        run,
        preset.name,
        torch.float32,
    )


def _save_as_hub(
    folder: Path, config: ClipGpt2Config, tokenizer: Tokenizer, weights: Mapping[str, Tensor]
) -> None:
    """Write a ``LanguageModel``'s weights as a ``GPT2LMHeadModel`` in the hub's layout."""
    ids = {
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": tokenizer.end_id,
        "pad_token_id": tokenizer.pad_id,
    }
    settings = gpt2_config(config, len(tokenizer), architectures=["GPT2LMHeadModel"], **ids)
    named = {
        f"transformer.{key.removeprefix('gpt2.')}": value.float() for key, value in weights.items()
    }
    with atomic_path(folder) as temporary:
        settings.save_pretrained(temporary)
        save_tensors(temporary / "model.safetensors", named, {"format": "pt"})
        write_json(temporary / "tokenizer.json", tokenizer.to_json())
