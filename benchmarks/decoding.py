"""Our decoder beside ``generate`` of the transformers library: same GPT-2, captions per second.

The GPT-2 is the language half of the CLIP + GPT-2 that the course trains on Flickr8k, with as many
tokens as Flickr8k uses of GPT-2's table. It learns made-up captions until it ends them by itself. A
token in place of the start token stands for the image. The five captions of an image differ by
synonyms and omitted words; their lengths are distributed like those that the shipped captioner
generates for Flickr8k.
"""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from capgen_utils.common.device import choose_device, choose_dtype
from capgen_utils.config import DecodingConfig
from capgen_utils.decoding.captions import Specials
from capgen_utils.decoding.search import decode
from capgen_utils.models.base import IGNORED, Memory, SharedState
from capgen_utils.models.clip_gpt2 import Gpt2Decoder, gpt2_config
from capgen_utils.presets import PRESETS

VOCABULARY = 7100
START, END, IMAGE, WORD = 0, 1, 100, 200  # tokens; images and words are numbered from there
IMAGES = 32
LENGTHS = (9.7, 2.6)  # mean and standard deviation, in words
LEARNING = 80  # training steps
LONGEST = 25  # tokens of a caption
REPEATS = 3  # the best one counts


@dataclass
class ImageTokens(Memory):
    """The tokens (B,) that stand for B images."""

    tokens: Tensor


class TokenGpt2(Gpt2Decoder):
    """GPT-2 that reads the image as a token."""

    name = "token_gpt2"
    feature = "token"

    def encode(self, features: Tensor) -> ImageTokens:
        """Tokens (B,) -> the same."""
        return ImageTokens(features)

    def start(self, memory: ImageTokens) -> SharedState:
        """The state before the first token."""
        floats = ImageTokens(memory.tokens.to(self.gpt2.wte.weight.dtype))  # the dtype of the cache
        return replace(super().start(floats), memory=memory)

    def step(
        self, tokens: Tensor, state: SharedState, attention: bool = False
    ) -> tuple[Tensor, SharedState, Mapping[str, Tensor]]:
        """Read the image's token in place of the start token."""
        first = state.cache[0].length == 0
        return super().step(state.memory.tokens[state.image] if first else tokens, state, attention)


def made_up_captions(generator: random.Random) -> list[list[int]]:
    """Return five captions of each image: its token, words, the end token."""
    rows = []
    for image in range(IMAGES):
        length = min(max(round(generator.gauss(*LENGTHS)), 4), LONGEST - 4)
        words = [WORD + 2 * generator.randrange(150) for _ in range(length)]
        for _ in range(5):
            # Each word has one synonym, the next odd number; some words are left out.
            caption = [w + (generator.random() < 0.3) for w in words if generator.random() < 0.95]
            rows.append([IMAGE + image, *caption, END])
    return rows


def learn(device: torch.device) -> TokenGpt2:
    """Train the GPT-2 on made-up captions."""
    generator = random.Random(0)
    rows = made_up_captions(generator)
    torch.manual_seed(0)
    config = replace(PRESETS["flickr8k"].recipe("clip_gpt2").config, dropout=0.0)
    model = TokenGpt2(config, VOCABULARY, WORD).to(device)
    with torch.no_grad():
        model.gpt2.wte.weight[IMAGE : IMAGE + IMAGES] *= 10  # easy to tell apart from the start
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 10)
    for _ in range(LEARNING):
        tokens = padded(generator.sample(rows, 32)).to(device)  # (B, T)
        targets, tokens = tokens[:, 1:].masked_fill(tokens[:, 1:] < 0, IGNORED), tokens.clamp(min=0)
        with torch.autocast(device.type, dtype=choose_dtype(device)):
            memory, image = model.encode(tokens[:, 0]), torch.arange(len(tokens), device=device)
            loss = model.loss(memory, tokens[:, :-1], image, targets) / (targets != IGNORED).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warm.step()
    return model.eval()


def padded(rows: list[list[int]]) -> Tensor:
    """Return rows of different lengths as one tensor (B, T), padded with -1."""
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=-1
    )


def library_model(own: TokenGpt2) -> Any:
    """Return the library's GPT-2 with the same weights."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel(
        gpt2_config(own.config, VOCABULARY, eos_token_id=END, pad_token_id=END)
    ).eval()
    model.transformer.load_state_dict(own.gpt2.state_dict())
    model.tie_weights()
    return model.to(own.gpt2.wte.weight.device)


def ours(model: TokenGpt2, images: Tensor, beam: int, fixed: bool) -> list[list[int]]:
    """Caption with our decoder; ``fixed``: all captions as long as possible."""
    config = DecodingConfig(beam=beam, max_length=LONGEST, min_length=LONGEST - 1 if fixed else 0)
    with torch.inference_mode():
        memory = model.encode(images)
    results = decode(model, memory, len(images), Specials(START, END), config)
    return [list(hypotheses[0].tokens) for hypotheses in results]


def librarys(model: Any, images: Tensor, beam: int, fixed: bool) -> list[list[int]]:
    """Caption with the library's ``generate``."""
    prompt = images[:, None]
    options = {"min_new_tokens": LONGEST - 1} if fixed else {}
    with torch.inference_mode():
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=LONGEST,
            do_sample=False,
            num_beams=beam,
            length_penalty=1.0,
            early_stopping=False,
            **options,
        )
    return [row[: row.index(END)] if END in row else row for row in out[:, 1:].tolist()]


def best_of(*works: Callable[[], Any]) -> list[float]:
    """Return the best time of each function in seconds, measured in turns."""
    best = [float("inf")] * len(works)
    for _ in range(REPEATS):
        for i, work in enumerate(works):
            started = time.perf_counter()
            work()
            best[i] = min(best[i], time.perf_counter() - started)
    return best


def compare(
    model: TokenGpt2, library: Any, images: Tensor, beam: int, fixed: bool = False
) -> dict[str, Any]:
    """Return both rates, their ratio, and the number of equal captions."""
    captions, others = ours(model, images, beam, fixed), librarys(library, images, beam, fixed)
    equal = sum(a == b for a, b in zip(captions, others, strict=True))
    seconds, library_seconds = best_of(
        lambda: ours(model, images, beam, fixed), lambda: librarys(library, images, beam, fixed)
    )
    lengths = [len(caption) for caption in captions]
    return {
        "captions_per_second": round(len(images) / seconds, 1),
        "library_captions_per_second": round(len(images) / library_seconds, 1),
        "ratio": round(library_seconds / seconds, 2),
        "equal_captions": f"{equal} of {len(images)}",
        "words": {"mean": round(sum(lengths) / len(lengths), 1), "longest": max(lengths)},
    }


def bench_library() -> dict[str, Any]:
    """Captions per second of both decoders, greedy and beam 5: a batch, fixed length, one image."""
    device = choose_device()
    model = learn(device)
    library = library_model(model)
    images = torch.arange(IMAGE, IMAGE + IMAGES, device=device)
    results: dict[str, Any] = {
        "dtype": "float32",
        "batch": IMAGES,
        "threads": torch.get_num_threads(),
    }
    for name, beam in (("greedy", 1), ("beam_5", 5)):
        results[name] = compare(model, library, images, beam)
        results[f"{name}_fixed_length"] = compare(model, library, images, beam, fixed=True)
        results[f"{name}_one_image"] = compare(model, library, images[:1], beam)
    return results
