"""Our decoder beside the transformers library's ``generate``: one GPT-2, the same captions, captions per second.

The GPT-2 (4 layers of 512, as many tokens as Flickr8k uses of GPT-2's table) learns the captions of a few drawn scenes,
until it ends them by itself. A token in front of the start token stands for the scene.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from capgen_utils.config import ClipGpt2Config, DecodingConfig, choose_device, choose_dtype
from capgen_utils.decoding import Specials, decode
from capgen_utils.models.base import IGNORED, Memory, SharedState
from capgen_utils.models.clip_gpt2 import Gpt2Decoder, gpt2_config
from capgen_utils.scenes import make_scene
from capgen_utils.shapes import describe
from capgen_utils.text import WordTokenizer

VOCABULARY = 7100
IMAGES = 32
LEARNING = 60  # steps
LONGEST = 25  # tokens of a caption
REPEATS = 3  # the best of so many counts


@dataclass
class SceneTokens(Memory):
    """The tokens (B,) that stand for B scenes."""

    tokens: Tensor


class SceneGpt2(Gpt2Decoder):
    """GPT-2 that is told by a token which scene to caption."""

    name = "scene_gpt2"
    feature = "token"

    def encode(self, features: Tensor) -> SceneTokens:
        """Tokens (B,) -> the same."""
        return SceneTokens(features)

    def start(self, memory: SceneTokens) -> SharedState:
        """The state after the scene's token."""
        like = SceneTokens(memory.tokens.to(self.gpt2.wte.weight.dtype))
        return self.step(memory.tokens, super().start(like))[1]


@dataclass
class Learned:
    """A trained GPT-2 and the tokens it knows."""

    model: SceneGpt2
    scenes: Tensor
    start: int
    end: int


def learn(device: torch.device) -> Learned:
    """Train the GPT-2 on five captions of each scene."""
    generator = random.Random(0)
    captions = [describe(make_scene(generator), generator) for _ in range(IMAGES)]
    tokenizer = WordTokenizer.fit((c for of_scene in captions for c in of_scene), 1)
    scenes = torch.arange(VOCABULARY - IMAGES, VOCABULARY, device=device)
    rows = [
        [int(scene), *tokenizer.encode(c)] for scene, of_scene in zip(scenes, captions, strict=True) for c in of_scene
    ]
    torch.manual_seed(0)
    sizes = {"n_embd": 512, "n_layer": 4, "n_head": 8, "n_positions": 64}
    config = ClipGpt2Config(seq_len=LONGEST + 1, dropout=0.0, **sizes)
    model = SceneGpt2(config, VOCABULARY, tokenizer.unk_id).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(LEARNING):
        tokens = padded(generator.sample(rows, 32), tokenizer.pad_id).to(device)
        targets = tokens[:, 1:].masked_fill(tokens[:, 1:] == tokenizer.pad_id, IGNORED)
        targets[:, 0] = IGNORED  # the start token is not said
        with torch.autocast(device.type, dtype=choose_dtype(device)):
            memory, image = model.encode(tokens[:, 0]), torch.arange(len(tokens), device=device)
            loss = model.loss(memory, tokens[:, :-1], image, targets) / (targets != IGNORED).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Learned(model.eval(), scenes, tokenizer.start_id, tokenizer.end_id)


def padded(rows: list[list[int]], pad: int) -> Tensor:
    """Return rows of different lengths as one tensor."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)


def library_model(learned: Learned) -> Any:
    """Return the library's GPT-2 with the same weights."""
    from transformers import GPT2LMHeadModel

    settings = gpt2_config(learned.model.config, VOCABULARY, eos_token_id=learned.end, pad_token_id=learned.end)
    model = GPT2LMHeadModel(settings).eval()
    model.transformer.load_state_dict(learned.model.gpt2.state_dict())
    model.tie_weights()
    return model.to(learned.scenes.device)


def ours(learned: Learned, images: int, beam: int, fixed: bool) -> list[list[int]]:
    """Caption the first scenes with our engine; ``fixed``: all as long as possible."""
    config = DecodingConfig(beam=beam, max_length=LONGEST, min_length=LONGEST - 1 if fixed else 0)
    with torch.inference_mode():
        memory = learned.model.encode(learned.scenes[:images])
    found = decode(learned.model, memory, images, Specials(learned.start, learned.end), config)
    return [list(hypotheses[0].tokens) for hypotheses in found]


def librarys(learned: Learned, model: Any, images: int, beam: int, fixed: bool) -> list[list[int]]:
    """Caption the first scenes with the library's ``generate``."""
    scenes = learned.scenes[:images]
    prompt = torch.stack([scenes, torch.full_like(scenes, learned.start)], dim=1)
    options = {"min_new_tokens": LONGEST - 1} if fixed else {}
    with torch.inference_mode():
        out = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=LONGEST, do_sample=False,
            num_beams=beam, length_penalty=1.0, early_stopping=False, **options,
        )  # fmt: skip
    rows = out[:, 2:].tolist()
    return [row[: row.index(learned.end)] if learned.end in row else row for row in rows]


def best_of(*works: Callable[[], Any]) -> list[float]:
    """Return the best time of each work in seconds, measured in turns."""
    best = [float("inf")] * len(works)
    for _ in range(REPEATS):
        for i, work in enumerate(works):
            started = time.perf_counter()
            work()
            best[i] = min(best[i], time.perf_counter() - started)
    return best


def compare(learned: Learned, model: Any, images: int, beam: int, fixed: bool = False) -> dict[str, Any]:
    """Return both rates, their ratio, and how many captions are equal."""
    own, other = ours(learned, images, beam, fixed), librarys(learned, model, images, beam, fixed)
    seconds, library_seconds = best_of(
        lambda: ours(learned, images, beam, fixed), lambda: librarys(learned, model, images, beam, fixed)
    )
    return {
        "captions_per_second": round(images / seconds, 1),
        "library_captions_per_second": round(images / library_seconds, 1),
        "ratio": round(library_seconds / seconds, 2),
        "equal_captions": f"{sum(a == b for a, b in zip(own, other, strict=True))} of {images}",
        "mean_length": round(sum(map(len, own)) / images, 1),
    }


def bench_library() -> dict[str, Any]:
    """Captions per second of both decoders: greedy and beam 5, a batch and one image, ended and of fixed length."""
    device = choose_device()
    learned = learn(device)
    model = library_model(learned)
    results: dict[str, Any] = {"dtype": "float32", "batch": IMAGES, "threads": torch.get_num_threads()}
    for name, beam in (("greedy", 1), ("beam_5", 5)):
        results[name] = compare(learned, model, IMAGES, beam)
        results[f"{name}_fixed_length"] = compare(learned, model, IMAGES, beam, fixed=True)
        results[f"{name}_one_image"] = compare(learned, model, 1, beam)
    return results
