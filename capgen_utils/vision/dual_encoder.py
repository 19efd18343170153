"""CLIP: images and texts in one space (arXiv 2103.00020); a published one, or a small one that is
trained here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capgen_utils.common.compat import import_torchvision
from capgen_utils.common.files import CapGenError, atomic_path, fingerprint, read_json, write_json
from capgen_utils.common.hub import load_pretrained
from capgen_utils.common.sinusoids import grid_sinusoids, sinusoids
from capgen_utils.common.tensors import compact, read_tensors, save_tensors
from capgen_utils.config import SmallClipConfig
from capgen_utils.data.images import ImageLike, is_many, open_image
from capgen_utils.text.bpe import BpeTokenizer
from capgen_utils.text.vocabulary import tokenizer_from_json
from capgen_utils.text.words import Tokenizer
from capgen_utils.vision.clip import (
    ATTENTION,
    CLIP_REMEDY,
    ClipVision,
    published_clip,
    require_clip,
    small_clip,
    small_clip_config,
    small_vision_config,
)
from capgen_utils.vision.encoder import Encoder, hash_tensors
from capgen_utils.vision.encoders import load_encoder_folder, save_encoder

TEXTS = 256  # read together
_REMEDY = "copy the whole folder again, or train it again (capgen pretrain)"


class DualEncoder(nn.Module):
    """A CLIP: an image half and a text half whose outputs are vectors of length 1 in the same
    space.

    What an image shows and what a text says is compared by the angle between their vectors, so one
    can be searched with the other, a caption judged, and an image classified by sentences.

    Args:
        clip: the library's ``CLIPModel``.
        images: its image half as an encoder; shares its weights.
        tokenizer: of the text half.
        source: where a published CLIP came from: its name on the hub, or a folder; ``None`` for one
            trained here.

    Attributes:
        clip, images, tokenizer, source: see above.
    """

    clip: Any

    def __init__(
        self, clip: nn.Module, images: ClipVision, tokenizer: Tokenizer, source: str | None = None
    ) -> None:
        super().__init__()
        self.clip, self.images, self.tokenizer, self.source = clip.eval(), images, tokenizer, source
        self.requires_grad_(False)

    @classmethod
    def new(cls, sizes: SmallClipConfig, stem: Encoder, tokenizer: Tokenizer) -> "DualEncoder":
        """Return an untrained small CLIP that looks at the grid of ``stem``.

        Raises:
            CapGenError: the stem has no square grid.
        """
        import_torchvision()
        from transformers import CLIPConfig, CLIPModel

        text = {
            "vocab_size": len(tokenizer),
            "hidden_size": sizes.text_width,
            "intermediate_size": 4 * sizes.text_width,
            "num_hidden_layers": sizes.text_layers,
            "num_attention_heads": sizes.text_heads,
            "projection_dim": sizes.embed_size,
            "max_position_embeddings": sizes.seq_len,
            "pad_token_id": tokenizer.pad_id,
            "bos_token_id": tokenizer.start_id,
            "eos_token_id": tokenizer.end_id,
        }
        settings: dict[str, Any] = {
            "text_config": text,
            "vision_config": small_vision_config(sizes, stem),
            "projection_dim": sizes.embed_size,
            "attn_implementation": ATTENTION,
        }
        clip = CLIPModel(CLIPConfig(**settings))
        _initialise(clip)
        return cls(clip, small_clip(clip, sizes, stem), tokenizer)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, tokenizer: Tokenizer | None = None
    ) -> "DualEncoder":
        """Load a CLIP that was published: from a local folder in the hub's layout, or by its name
        on the hub.

        Args:
            source: a folder, or a name such as ``openai/clip-vit-base-patch32``.
            tokenizer: of the text half; by default CLIP's whole table.

        Raises:
            CapGenError: it can be neither found nor downloaded, or is no CLIP; names the three ways
                to provide one.
        """
        import_torchvision()
        from transformers import CLIPModel

        clip = load_pretrained(CLIPModel, source, CLIP_REMEDY)
        if tokenizer is None:
            has_table = (Path(source) / "merges.txt").is_file()
            tokenizer = BpeTokenizer.full("clip", Path(source) if has_table else None, clean=False)
        if clip.config.text_config.vocab_size != len(tokenizer):
            raise CapGenError(
                f"{source} reads {clip.config.text_config.vocab_size} tokens, and there are {len(tokenizer)}",
                CLIP_REMEDY,
            )
        return cls(clip, published_clip(clip, Path(source).name), tokenizer, str(source))

    @classmethod
    def published(cls, name: str, weights: Path | None = None) -> "DualEncoder":
        """Load the published CLIP ``name``, a key of ``encoders.CLIPS``.

        Args:
            name: what its image half is called too, wherever the weights come from.
            weights: a local folder in the hub's layout; else the hub's own is taken.

        Raises:
            CapGenError: it can be neither found nor downloaded, or is another CLIP.
        """
        dual = cls.from_pretrained(weights or f"openai/{name}")
        require_clip(dual.images, name, dual.source)
        dual.images.name = name
        return dual

    # --- from images and texts to vectors

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.clip.logit_scale.device

    @property
    def name(self) -> str:
        """What results call it: "small_clip on efficientnet_lite0"."""
        return self.images.name

    @torch.no_grad()
    def embed_images(
        self,
        images: ImageLike | Sequence[ImageLike],
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ) -> Tensor:
        """Encode photographs into vectors (B, E) of length 1, on the CPU.

        Args:
            images: a path, PIL image, array (H, W, 3) or torch tensor (3, H, W), or a sequence of
                them; also a tensor (B, 3, H, W). Numbers are uint8, or float from 0 to 1.
            dtype: compute dtype of the image half, or of its stem where it has one.
            batch_size: images that are encoded together.

        Raises:
            CapGenError: an image cannot be read.
        """
        many: Sequence[Any] = images if is_many(images) else [images]  # type: ignore[assignment]
        found = [torch.empty(0, self.images.outputs["embedding"][0])]
        for start in range(0, len(many), batch_size):
            part = many[start : start + batch_size]
            pixels = torch.from_numpy(
                np.stack([self.images.preprocessing(open_image(image)) for image in part])
            )
            with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
                found.append(self.images(pixels.to(self.device))["embedding"].float().cpu())
        return torch.cat(found)

    @torch.no_grad()
    def embed_grid(self, grid: Tensor) -> Tensor:
        """Encode the stem's grid (B, N, D), as a cache holds it, into vectors (B, E) of length 1,
        on the CPU."""
        return self.images.from_stem(grid.to(self.device))["embedding"].cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Encode ``texts`` into vectors (n, E) of length 1, on the CPU; long ones are cut at the
        longest possible."""
        found = [torch.empty(0, self.images.outputs["embedding"][0])]
        for start in range(0, len(texts), TEXTS):
            tokens = self.tokens(texts[start : start + TEXTS])
            found.append(self.read(tokens.to(self.device)).cpu())
        return torch.cat(found)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Return token ids (n, T) of ``texts``, each with its start and end token, then padding."""
        longest = self.clip.config.text_config.max_position_embeddings
        return pad([self.tokenizer.encode(text, longest) for text in texts], self.tokenizer.pad_id)

    def read(self, tokens: Tensor) -> Tensor:
        """Encode token ids (M, T) into vectors (M, E) of length 1: the end token's, which has seen
        all before it.

        The place of the end token is found here: for a table whose end token has the id 2, which
            the first
        configurations of CLIP named by mistake, the library would look for the highest id instead.
        """
        hidden = self.clip.text_model(input_ids=tokens).last_hidden_state
        ends = (tokens != self.tokenizer.pad_id).sum(1) - 1
        last = hidden[torch.arange(len(tokens), device=tokens.device), ends]
        return F.normalize(self.clip.text_projection(last).float(), dim=-1)

    # --- comparing

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        """Return the cosines (B, M) of image vectors (B, E) and text vectors (M, E)."""
        return images @ texts.T

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """Return the cosines over the learned temperature (B, M); a softmax of them says which
        belongs to which."""
        return self.similarity(images, texts) * self.clip.logit_scale.exp().to(images.device)

    @torch.no_grad()
    def classify(
        self, images: Tensor, labels: Sequence[str], prompts: Sequence[str] = ("a photo of a {}",)
    ) -> Tensor:
        """Classify without training for it (zero-shot): a class is the mean of what the prompts say
        of it.

        Args:
            images: vectors (B, E).
            labels: names of the classes.
            prompts: sentences with ``{}`` in the place of the label.

        Returns:
            Probabilities (B, classes).
        """
        texts = [prompt.format(label) for label in labels for prompt in prompts]
        vectors = self.embed_texts(texts).view(len(labels), len(prompts), -1).mean(1)
        return self.logits(images, F.normalize(vectors, dim=-1).to(images.device)).softmax(-1)

    # --- on disk

    def _text_half(self) -> dict[str, Tensor]:
        images = {"vision_model", "visual_projection"}
        return {
            key: value
            for key, value in self.clip.state_dict().items()
            if key.split(".")[0] not in images
        }

    def text_hash(self) -> str:
        """Return a hash (16 hexadecimal digits) of the text half's weights, the temperature
        included."""
        return hash_tensors(self._text_half())

    def weights_hash(self) -> str:
        """Return a hash (16 hexadecimal digits) of both halves."""
        return fingerprint([self.images.weights_hash(), self.text_hash()])

    def describe(self) -> dict[str, Any]:
        """Return what its folder and a result say of it: the image half's description, and the text
        half's."""
        return self.images.describe() | {
            "text": {"weights_hash": self.text_hash(), "source": self.source}
        }

    def save(self, folder: Path) -> None:
        """Write it as a folder, in one atomic step: that of its image half as an encoder, and two
        files more.

        Of a published CLIP only its source is written.

        Raises:
            CapGenError: the folder cannot be written.
        """
        with atomic_path(folder) as temporary:
            if self.source is None:
                save_encoder(temporary, self.images)
                save_tensors(temporary / "text.safetensors", compact(self._text_half()))
                write_json(temporary / "tokenizer.json", self.tokenizer.to_json())
            temporary.mkdir(exist_ok=True)
            write_json(temporary / "config.json", self.describe())

    @classmethod
    def load(cls, folder: Path, weights: Path | None = None) -> "DualEncoder":
        """Load what ``save`` wrote. It is data, never code: names, shapes and sizes are checked
        before use.

        Args:
            folder: holds ``config.json``, ``model.safetensors``, ``text.safetensors``,
                ``tokenizer.json`` and, where the stem is not public, ``stem/``.
            weights: a local weights file of the stem, or folder of a published CLIP, where it
                cannot be downloaded.

        Raises:
            CapGenError: a file is missing or damaged, or they do not fit together.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CapGenError(
                f"there is no folder {folder} with a dual encoder", "train one: capgen pretrain"
            )
        described = read_json(folder / "config.json", _REMEDY)
        text = described.get("text") if isinstance(described, dict) else None
        if not isinstance(text, dict):
            raise CapGenError(f"{folder} holds no dual encoder", _REMEDY)
        if isinstance(text.get("source"), str):
            dual = cls.from_pretrained(weights or text["source"])
        else:
            dual = cls._load_small(folder, load_encoder_folder(folder, weights))
        if dual.text_hash() != text.get(
            "weights_hash"
        ) or dual.images.weights_hash() != described.get("weights_hash"):
            raise CapGenError(
                f"{folder}: the weights are not those that config.json describes", _REMEDY
            )
        return dual

    @classmethod
    def _load_small(cls, folder: Path, images: Encoder) -> "DualEncoder":
        if images.stem is None:
            raise CapGenError(f"{folder} holds no dual encoder", _REMEDY)
        sizes = small_clip_config(images.settings)
        tokenizer = tokenizer_from_json(read_json(folder / "tokenizer.json", _REMEDY))
        with torch.device("meta"):  # shapes first: nothing is allocated for weights that do not fit
            shapes = {
                k: v.shape for k, v in cls.new(sizes, images.stem, tokenizer)._text_half().items()
            }
        tensors = read_tensors(folder / "text.safetensors", shapes, _REMEDY)
        dual = cls.new(sizes, images.stem, tokenizer)
        dual.clip.load_state_dict(
            images.trunk.state_dict() | {k: v.float() for k, v in tensors.items()}
        )
        dual.images.training_run = images.training_run
        return dual


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Return rows of ids as one tensor (n, T), short ones filled with ``pad_id``."""
    tokens = torch.full((len(rows), max(map(len, rows), default=0)), pad_id)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return tokens


SHARP = 2.0  # factor of the library's standard deviations


@torch.no_grad()
def _initialise(clip: Any) -> None:
    """Let words, image vectors and their places start at about unit size, and the reader's
    attention start out sharp.

    CLIP's own beginning suits 12 layers and millions of pairs. With places of a fiftieth of unit
    size it learns what is in an image long before it learns where. And a reader whose heads begin
    by looking at all words alike learns late which colour was said of which thing.
    """
    text, vision = clip.text_model.embeddings, clip.vision_model.embeddings
    text.token_embedding.weight.normal_()
    places, width = text.position_embedding.weight.shape
    text.position_embedding.weight.copy_(sinusoids(torch.arange(places), width))
    patches = vision.patch_embedding.weight
    patches.normal_(std=patches[0].numel() ** -0.5)
    places, width = vision.position_embedding.weight.shape
    vision.position_embedding.weight[1:] = grid_sinusoids(
        places - 1, width
    )  # the first place is the class token's
    for layer in clip.text_model.encoder.layers:
        own = layer.self_attn
        for projection in (own.q_proj, own.k_proj, own.v_proj, own.out_proj):
            projection.weight.mul_(SHARP)
