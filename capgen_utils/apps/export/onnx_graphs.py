"""A captioner as ONNX graphs, which run without torch: ``onnx_captioner`` runs them.

There are three: ``encoder`` (pixels to features), ``memory`` (features to what is computed once for
an image, and the state before the first word) and ``step`` (a token and the state, to scores of the
next token and the state after it). What is traced are the captioner's own methods, so nothing of a
captioner is written twice.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from capgen_utils.apps.export.onnx_captioner import GRAPHS, LARGEST, VERSION, OnnxCaptioner
from capgen_utils.bundle import Bundle, load_bundle
from capgen_utils.common.files import CapGenError, atomic_path, sha256_file, write_json
from capgen_utils.decoding.options import longest_caption
from capgen_utils.models import CaptionModel
from capgen_utils.models.base import KeyValues, Memory, SharedState
from capgen_utils.vision.encoder import Encoder

TOLERANCE = 1e-3  # of a graph's largest number; float32 on both sides differs by less than a hundredth of it
INSTALL = "run: pip install -c constraints.txt onnx onnxscript onnxruntime (pip install 'capgen-utils[onnx]')"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


_EXAMPLES = (
    3  # images that graphs are traced and checked with; sizes 0 and 1 would be taken for constants
)


_WORDS = 4  # tokens in the cache that ``step`` is traced with


def export_onnx(
    folder: Path, output: Path, encoder_weights: Path | None = None
) -> dict[str, float]:
    """Write the bundle in ``folder`` as ONNX graphs, checked against torch, in one atomic step.

    Args:
        folder: a bundle.
        output: folder of the graphs; replaced when it exists.
        encoder_weights: a local weights file of the encoder, where its own cannot be downloaded.

    Returns:
        For each graph the largest absolute difference between ONNX Runtime and torch on the same
        inputs.

    Raises:
        CapGenError: a package is missing, the bundle cannot be loaded, or a graph cannot be made or
            computes something else.
    """
    missing = [name for name in _PACKAGES if util.find_spec(name) is None]
    if missing:
        raise CapGenError(f"{missing[0]} is not installed", INSTALL)
    bundle = load_bundle(folder, encoder_weights)
    encoder = bundle.build_encoder()
    with atomic_path(output) as temporary, torch.inference_mode(False), torch.no_grad():
        temporary.mkdir()
        _write_graphs(temporary, bundle.model, encoder)
        write_json(temporary / "tokenizer.json", bundle.tokenizer.to_json())
        described = _describe(temporary, bundle, encoder)
        write_json(temporary / "config.json", described | {"check": {}})
        check = compare(OnnxCaptioner.from_folder(temporary), bundle.model, encoder)
        write_json(temporary / "config.json", described | {"check": check})
    return check


def _describe(folder: Path, bundle: Bundle, encoder: Encoder) -> dict[str, Any]:
    """Return what ``config.json`` says, all but the check."""
    memory = bundle.model.encode(torch.zeros(1, *encoder.outputs[bundle.model.feature]))
    graphs = {name: folder / f"{name}.onnx" for name in GRAPHS}
    return {
        "format": "onnx",
        "version": VERSION,
        "model": bundle.info["model"],
        "encoder": encoder.name,
        "preprocessing": asdict(encoder.preprocessing),
        "decoding": bundle.decoding.to_json(),
        "longest": longest_caption(bundle.model),
        "vocabulary": len(bundle.tokenizer),
        "feature_shape": list(encoder.outputs[bundle.model.feature]),
        "memory_axis": memory.axis,
        "graphs": {
            n: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for n, p in graphs.items()
        },
        "versions": {name: metadata.version(name) for name in ("torch", *_PACKAGES)},
        "trained": {key: bundle.info.get(key) for key in ("dataset", "preset", "revision")},
    }


# --- what is traced


class EncoderGraph(nn.Module):
    """Pixels (B, size, size, 3), uint8 -> the features (B, ...) that the captioner reads."""

    def __init__(self, encoder: Encoder, output: str) -> None:
        super().__init__()
        self.encoder, self.output = encoder, output

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode."""
        features: Tensor = self.encoder(pixels)[self.output].float()
        return features


class MemoryGraph(nn.Module):
    """Features (B, ...) -> the tensors of the memory, then those of the state before the first
    token."""

    def __init__(self, model: CaptionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """Encode, and start."""
        memory = self.model.encode(features)
        state: Any = self.model.start(memory)
        cache = [tensor for part in state.cache for tensor in _cache_tensors(part)]
        return *memory.tensors().values(), *(tensor.clone() for tensor in cache)


def _cache_tensors(part: Any) -> Sequence[Tensor]:
    """Return a part of a state's cache as tensors; empty keys and values as (layers, M, heads, 0,
    width)."""
    if not isinstance(part, KeyValues):
        return [part]
    rows, _, _, heads, width = part.blocks[0].shape
    empty = part.blocks[0].new_zeros(len(part.blocks), rows, heads, part.length, width)
    return [empty, empty]


class StepGraph(nn.Module):
    """A token, the memory and the cache of each hypothesis -> logits (M, V), and the cache after
    the token.

    Args:
        model: the captioner.
        state: one of its states; says which parts of the cache are keys and values.
    """

    def __init__(self, model: CaptionModel, state: SharedState) -> None:
        super().__init__()
        self.model, self.kind, self.names = model, type(state.memory), list(state.memory.tensors())
        self.grows = [isinstance(part, KeyValues) for part in state.cache]

    def forward(
        self, tokens: Tensor, memory: Sequence[Tensor], cache: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Read one token for each of M hypotheses, each of which has its own row of the memory."""
        rest = iter(cache)
        parts = tuple(
            GrowingKeyValues(next(rest), next(rest)) if grows else next(rest)
            for grows in self.grows
        )
        own: Memory = self.kind(**dict(zip(self.names, memory, strict=True)))
        state = SharedState(own, torch.arange(tokens.shape[0]), parts)
        state.grouping = OwnRows()  # type: ignore[assignment]
        logits, after, _ = self.model.step(tokens, state)
        grown = [
            part.tensors() if isinstance(part, GrowingKeyValues) else [part] for part in after.cache
        ]
        return logits, *(tensor for part in grown for tensor in part)


class GrowingKeyValues:
    """``KeyValues`` for a graph: nothing is written in place, and any number of earlier tokens will
    do.

    Args:
        keys, values: (layers, M, heads, T, width).
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self.length = keys, values, keys.shape[3]
        self.grown: list[tuple[Tensor, Tensor]] = []

    def longer(self) -> "GrowingKeyValues":
        """As ``KeyValues.longer``."""
        after = GrowingKeyValues(self.keys, self.values)
        after.length += 1
        return after

    def put(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As ``KeyValues.put``."""
        self.grown.append(
            (torch.cat([self.keys[layer], key], 2), torch.cat([self.values[layer], value], 2))
        )
        return self.grown[-1]

    def at_first(self, first: Tensor, later: Tensor) -> Tensor:
        """As ``KeyValues.at_first``, decided by the graph."""
        return torch.where(torch.full((), self.keys.shape[3]) == 0, first, later)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all layers, with the newest token's."""
        keys, values = zip(*self.grown, strict=True)
        return torch.stack(keys), torch.stack(values)


class OwnRows:
    """``Grouping`` for captions that have an image each."""

    def gather(self, rows: Tensor) -> Tensor:
        """(M, ...) -> (M, 1, ...)."""
        return rows[:, None]

    def scatter(self, grouped: Tensor) -> Tensor:
        """(M, 1, ...) -> (M, ...)."""
        return grouped[:, 0]


# --- tracing


def _write_graphs(folder: Path, model: CaptionModel, encoder: Encoder) -> None:
    batch, size = torch.export.Dim("batch"), encoder.preprocessing.size
    pixels = torch.zeros(_EXAMPLES, size, size, 3, dtype=torch.uint8)
    features = torch.zeros(_EXAMPLES, *encoder.outputs[model.feature])
    _write(
        folder,
        "encoder",
        EncoderGraph(encoder, model.feature),
        (pixels,),
        ({0: batch},),
        ["pixels"],
        ["features"],
    )
    memory = model.encode(features)
    state: Any = model.start(memory)
    names = [f"memory_{name}" for name in memory.tensors()]
    first = MemoryGraph(model)(features)[len(names) :]
    caches = [f"cache_{i}" for i in range(len(first))]
    _write(
        folder,
        "memory",
        MemoryGraph(model),
        (features,),
        ({0: batch},),
        ["features"],
        names + caches,
    )
    rows, words = torch.export.Dim("rows"), torch.export.Dim("words", max=longest_caption(model))
    # A cache that grows is empty at first, and traced with some words in it.
    grown = tuple(
        c.new_zeros(*c.shape[:3], _WORDS, c.shape[4]) if c.ndim == 5 else c for c in first
    )
    sizes = tuple({1: rows, 3: words} if c.ndim == 5 else {1: rows} for c in first)
    inputs = (torch.zeros(_EXAMPLES, dtype=torch.int64), tuple(memory.tensors().values()), grown)
    dynamic = ({0: rows}, tuple({memory.axis: rows} for _ in names), sizes)
    outputs = ["logits", *(f"next_{name}" for name in caches)]
    _write(
        folder,
        "step",
        StepGraph(model, state),
        inputs,
        dynamic,
        ["tokens", *names, *caches],
        outputs,
    )


def _write(
    folder: Path,
    name: str,
    graph: nn.Module,
    inputs: Any,
    dynamic: Any,
    ins: Sequence[str],
    outs: Sequence[str],
) -> None:
    """Trace ``graph`` on ``inputs``, whose sizes named in ``dynamic`` may change, and write it."""
    path = folder / f"{name}.onnx"
    try:
        with _quiet():
            program = torch.export.export(
                graph.eval(), inputs, dynamic_shapes=dynamic, strict=False
            )
            options: Any = {"dynamo": True, "verbose": False, "external_data": False}
            made: Any = torch.onnx.export(
                program, input_names=list(ins), output_names=list(outs), **options
            )
            made.save(path, external_data=False)
    except Exception as error:  # exporters raise many kinds
        reason = " ".join(str(error).split())[:300]
        raise CapGenError(
            f"the {name} cannot be written as an ONNX graph: {reason}", INSTALL
        ) from error
    if path.stat().st_size > LARGEST:
        raise CapGenError(
            f"the {name} is too large for one ONNX file", "export a smaller captioner"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes for its own developers off the screen: what is wrong becomes an
    error."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


# --- the check


def compare(exported: OnnxCaptioner, model: CaptionModel, encoder: Encoder) -> dict[str, float]:
    """Run graphs and captioner on the same noise and compare: pixels to features, to memory, and a
    few words.

    Returns:
        For each graph the largest absolute difference.

    Raises:
        CapGenError: one differs by more than ``TOLERANCE`` of its largest number.
    """
    random, size = np.random.default_rng(0), encoder.preprocessing.size
    found: dict[str, list[tuple[Any, Any]]] = {name: [] for name in GRAPHS}
    for images in (_EXAMPLES, 1):
        pixels = random.integers(0, 256, (images, size, size, 3), dtype=np.uint8)
        features = encoder(torch.from_numpy(pixels))[model.feature].float()
        found["encoder"].append((exported.encode(pixels), features.half().float()))
        memory = model.encode(features)
        state: Any = model.start(memory)
        own = exported.start(features.numpy())
        found["memory"] += [
            (own.memory[f"memory_{name}"], value) for name, value in memory.tensors().items()
        ]
        tokens = torch.full((images,), exported.specials.start)
        for _ in range(min(6, longest_caption(model))):
            logits, state, _ = model.step(tokens, state)
            scores, own = own.step(tokens.numpy())
            found["step"].append((scores, logits))
            tokens = logits.argmax(-1)
    return {name: _largest_difference(name, pairs) for name, pairs in found.items()}


def _largest_difference(name: str, pairs: Sequence[tuple[np.ndarray, Tensor]]) -> float:
    differences = [float(np.abs(own - other.numpy()).max()) for own, other in pairs]
    scale = max(float(other.abs().max()) for _, other in pairs)
    if not max(differences) <= TOLERANCE * max(scale, 1.0):
        raise CapGenError(
            f"the exported {name} differs from torch's by {max(differences):.2g}", INSTALL
        )
    return max(differences)
