"""CLIP (arXiv 2103.00020) puts images and texts into one space (notebook 06)."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capgen_utils.common.files import CapGenError, atomic_path, fingerprint, read_json, write_json
from capgen_utils.common.hub import import_torchvision, load_pretrained
from capgen_utils.common.tensors import (
    compact,
    grid_sinusoids,
    read_tensors,
    save_tensors,
    sinusoids,
)
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

TEXT_BATCH = 256
SHARPNESS = 2.0  # factor on the text half's initial attention weights
_REMEDY = "copy the whole folder again, or train it again (capgen pretrain)"


class DualEncoder(nn.Module):
    """A CLIP: an image half and a text half whose outputs are unit vectors in the same space.

    The angle between two vectors compares an image with a text. So one can be searched with the
    other, a caption judged, and an image classified by sentences.

    Args:
        clip: a ``CLIPModel`` of transformers.
        images: its image half as an encoder; shares its weights.
        tokenizer: of the text half.
        source: of a published CLIP, its name on the hub or its folder; ``None`` if trained here.

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
        """Return an untrained small CLIP that reads the grid of ``stem``.

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
        """Load a published CLIP from a local folder in the hub's layout, or by its name on the hub.

        Args:
            source: a folder, or a name such as ``openai/clip-vit-base-patch32``.
            tokenizer: of the text half; by default CLIP's whole table.

        Raises:
            CapGenError: it can be neither found nor downloaded, or is not a CLIP; names the three
                ways to provide one.
        """
        clip = load_pretrained("CLIPModel", source, CLIP_REMEDY)
        if tokenizer is None:
            folder = Path(source) if (Path(source) / "merges.txt").is_file() else None
            tokenizer = BpeTokenizer.full("clip", folder, clean=False)
        size = clip.config.text_config.vocab_size
        if size != len(tokenizer):
            raise CapGenError(
                f"{source} reads {size} tokens, but the tokenizer has {len(tokenizer)}", CLIP_REMEDY
            )
        return cls(clip, published_clip(clip, Path(source).name), tokenizer, str(source))

    @classmethod
    def published(cls, name: str, weights: Path | None = None) -> "DualEncoder":
        """Load the published CLIP ``name``, a key of ``clip.CLIPS``.

        Args:
            name: also names the image half, wherever the weights come from.
            weights: a local folder in the hub's layout; by default the model is taken from the hub.

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
        """The device of the weights."""
        return self.clip.logit_scale.device

    @property
    def name(self) -> str:
        """Its name in results: "small_clip on efficientnet_lite0"."""
        return self.images.name

    @torch.no_grad()
    def embed_images(
        self,
        images: ImageLike | Sequence[ImageLike],
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ) -> Tensor:
        """Encode images into vectors (B, E) of length 1, on the CPU.

        Args:
            images: a path, PIL image, array (H, W, 3) or torch tensor (3, H, W), or a sequence of
                them; also a tensor (B, 3, H, W). Numbers are uint8, or float from 0 to 1.
            dtype: compute dtype of the image half, or of its stem if it has one.
            batch_size: images that are encoded together.

        Raises:
            CapGenError: an image cannot be read.
        """
        many: Sequence[Any] = images if is_many(images) else [images]  # type: ignore[assignment]
        vectors = [torch.empty(0, self.images.outputs["embedding"][0])]
        for start in range(0, len(many), batch_size):
            opened = map(open_image, many[start : start + batch_size])
            pixels = torch.from_numpy(np.stack([self.images.preprocessing(i) for i in opened]))
            with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
                vectors.append(self.images(pixels.to(self.device))["embedding"].float().cpu())
        return torch.cat(vectors)

    @torch.no_grad()
    def embed_grid(self, grid: Tensor) -> Tensor:
        """Encode the stem's cached grid (B, N, D) into vectors (B, E) of length 1, on the CPU."""
        return self.images.from_stem(grid.to(self.device))["embedding"].cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Encode texts into vectors (n, E) of length 1, on the CPU; too long texts are cut."""
        vectors = [torch.empty(0, self.images.outputs["embedding"][0])]
        for start in range(0, len(texts), TEXT_BATCH):
            tokens = self.tokens(texts[start : start + TEXT_BATCH]).to(self.device)
            vectors.append(self.read(tokens).cpu())
        return torch.cat(vectors)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Return token ids (n, T) of ``texts``, each with start and end token, then padding."""
        longest = self.clip.config.text_config.max_position_embeddings
        return pad([self.tokenizer.encode(text, longest) for text in texts], self.tokenizer.pad_id)

    def read(self, tokens: Tensor) -> Tensor:
        """Encode token ids (M, T) into vectors (M, E) of length 1.

        The vector is that of the end token, which has attended to all others. Its position is
        computed here: for a table whose end token has the id 2, which CLIP's first configurations
        named by mistake, transformers would look for the highest id instead.
        """
        hidden = self.clip.text_model(input_ids=tokens).last_hidden_state  # (M, T, D)
        ends = (tokens != self.tokenizer.pad_id).sum(1) - 1
        last = hidden[torch.arange(len(tokens), device=tokens.device), ends]  # (M, D)
        return F.normalize(self.clip.text_projection(last).float(), dim=-1)

    # --- comparing

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        """Return the cosines (B, M) of image vectors (B, E) and text vectors (M, E)."""
        return images @ texts.T

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """Return the cosines divided by the learned temperature (B, M), ready for a softmax."""
        return self.similarity(images, texts) * self.clip.logit_scale.exp().to(images.device)

    @torch.no_grad()
    def classify(
        self, images: Tensor, labels: Sequence[str], prompts: Sequence[str] = ("a photo of a {}",)
    ) -> Tensor:
        """Classify without training (zero-shot): a class is the mean vector of its prompts.

        Args:
            images: vectors (B, E).
            labels: names of the classes.
            prompts: sentences with ``{}`` for the label.

        Returns:
            Probabilities (B, classes).
        """
        texts = [prompt.format(label) for label in labels for prompt in prompts]
        vectors = self.embed_texts(texts).view(len(labels), len(prompts), -1).mean(1)
        return self.logits(images, F.normalize(vectors, dim=-1).to(images.device)).softmax(-1)

    # --- on disk

    def _text_half(self) -> dict[str, Tensor]:
        vision = ("vision_model.", "visual_projection.")
        return {k: v for k, v in self.clip.state_dict().items() if not k.startswith(vision)}

    def text_hash(self) -> str:
        """Return a hash (16 hexadecimal digits) of the text half's weights and the temperature."""
        return hash_tensors(self._text_half())

    def weights_hash(self) -> str:
        """Return a hash (16 hexadecimal digits) of both halves."""
        return fingerprint([self.images.weights_hash(), self.text_hash()])

    def describe(self) -> dict[str, Any]:
        """Return the description that its folder and results hold: image half, then text half."""
        return self.images.describe() | {
            "text": {"weights_hash": self.text_hash(), "source": self.source}
        }

    def save(self, folder: Path) -> None:
        """Write a folder in one atomic step: the image half as an encoder, and two more files.

        Of a published CLIP only the source is written.

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
        """Load what ``save`` wrote: data, never code; names, shapes and sizes are checked first.

        Args:
            folder: holds ``config.json``, ``model.safetensors``, ``text.safetensors``,
                ``tokenizer.json`` and, if the stem is not public, ``stem/``.
            weights: a local weights file of the stem, or folder of a published CLIP, if it cannot
                be downloaded.

        Raises:
            CapGenError: a file is missing or damaged, or they do not fit together.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CapGenError(
                f"there is no folder {folder} with a dual encoder", "train one: capgen pretrain"
            )
        description = read_json(folder / "config.json", _REMEDY)
        text = description.get("text") if isinstance(description, dict) else None
        if not isinstance(text, dict):
            raise CapGenError(f"{folder} holds no dual encoder", _REMEDY)
        if isinstance(text.get("source"), str):
            dual = cls.from_pretrained(weights or text["source"])
        else:
            dual = cls._load_small(folder, load_encoder_folder(folder, weights))
        if (text.get("weights_hash"), description.get("weights_hash")) != (
            dual.text_hash(),
            dual.images.weights_hash(),
        ):
            raise CapGenError(
                f"{folder}: the weights are not those that config.json describes", _REMEDY
            )
        return dual

    @classmethod
    def _load_small(cls, folder: Path, images: Encoder) -> "DualEncoder":
        if images.stem is None:
            raise CapGenError(f"{folder} holds no dual encoder", _REMEDY)
        tokenizer = tokenizer_from_json(read_json(folder / "tokenizer.json", _REMEDY))
        build = partial(cls.new, small_clip_config(images.settings), images.stem, tokenizer)
        with torch.device("meta"):  # shapes first: nothing is allocated for weights that do not fit
            shapes = {key: value.shape for key, value in build()._text_half().items()}
        tensors = read_tensors(folder / "text.safetensors", shapes, _REMEDY)
        dual = build()
        text = {key: value.float() for key, value in tensors.items()}
        dual.clip.load_state_dict(images.trunk.state_dict() | text)
        dual.images.training_run = images.training_run
        return dual


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Return rows of ids as one tensor (n, T), short ones filled with ``pad_id``."""
    tokens = torch.full((len(rows), max(map(len, rows), default=0)), pad_id)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return tokens


@torch.no_grad()
def _initialise(clip: Any) -> None:
    """Start words, image vectors and positions at about unit size, and text attention sharp.

    CLIP's own initialisation suits 12 layers and millions of pairs. With positions of a fiftieth of
    unit size, it learns the objects of an image long before their positions. And heads that begin
    by attending to all words alike learn late which colour belongs to which object.
    """
    text, vision = clip.text_model.embeddings, clip.vision_model.embeddings
    text.token_embedding.weight.normal_()
    positions, width = text.position_embedding.weight.shape
    text.position_embedding.weight.copy_(sinusoids(torch.arange(positions), width))
    patches = vision.patch_embedding.weight
    patches.normal_(std=patches[0].numel() ** -0.5)
    positions, width = vision.position_embedding.weight.shape
    # the first position is the class token's
    vision.position_embedding.weight[1:] = grid_sinusoids(positions - 1, width)
    for layer in clip.text_model.encoder.layers:
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            getattr(layer.self_attn, name).weight.mul_(SHARPNESS)
