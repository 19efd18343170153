"""A captioner as ONNX graphs, which ``onnx_captioner`` runs without torch.

There are three graphs: ``encoder`` (pixels to features), ``memory`` (features to memory and the
state before the first token) and ``step`` (a token and a state to logits and the next state). They
are traced from the captioner's own methods, so that no captioner is written twice.
"""

import logging
import warnings
from collections.abc import Sequence
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

TOLERANCE = 1e-3  # of a graph's largest output; float32 rounding stays a hundred times below
INSTALL = "run: pip install -c constraints.txt onnx onnxscript onnxruntime"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_EXAMPLES = 3  # images for tracing and checking; sizes 0 and 1 would become constants
_WORDS = 4  # tokens in the cache when ``step`` is traced


def export_onnx(
    folder: Path, output: Path, encoder_weights: Path | None = None
) -> dict[str, float]:
    """Write the bundle in ``folder`` as ONNX graphs, checked against torch, in one atomic step.

    Args:
        folder: a bundle.
        output: folder of the graphs; replaced when it exists.
        encoder_weights: a local weights file of the encoder, if it cannot be downloaded.

    Returns:
        For each graph, the largest absolute difference between ONNX Runtime and torch.

    Raises:
        CapGenError: a package is missing, the bundle cannot be loaded, or a graph cannot be traced
            or computes something else.
    """
    missing = [name for name in _PACKAGES if util.find_spec(name) is None]
    if missing:
        raise CapGenError(f"{missing[0]} is not installed", INSTALL)
    bundle = load_bundle(folder, encoder_weights)
    encoder = bundle.build_encoder()
    with atomic_path(output) as temporary, torch.inference_mode(False), torch.no_grad():
        temporary.mkdir()
        write_graphs(temporary, bundle.model, encoder)
        write_json(temporary / "tokenizer.json", bundle.tokenizer.to_json())
        described = describe_export(temporary, bundle, encoder)
        write_json(temporary / "config.json", described | {"check": {}})
        check = compare(OnnxCaptioner.from_folder(temporary), bundle.model, encoder)
        write_json(temporary / "config.json", described | {"check": check})
    return check


def describe_export(folder: Path, bundle: Bundle, encoder: Encoder) -> dict[str, Any]:
    """Return the contents of ``config.json``, without the check."""
    memory = bundle.model.encode(torch.zeros(1, *encoder.outputs[bundle.model.feature]))
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
            name: {
                "bytes": (folder / f"{name}.onnx").stat().st_size,
                "sha256": sha256_file(folder / f"{name}.onnx"),
            }
            for name in GRAPHS
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
    """Features (B, ...) -> the tensors of the memory, then those of the first state."""

    def __init__(self, model: CaptionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """Encode and start."""
        memory = self.model.encode(features)
        state: Any = self.model.start(memory)
        cache: list[Tensor] = []
        for part in state.cache:
            if isinstance(part, KeyValues):  # keys and values (layers, M, heads, 0, width)
                rows, _, _, heads, width = part.blocks[0].shape
                cache += [
                    part.blocks[0].new_zeros((len(part.blocks), rows, heads, part.length, width))
                ] * 2
            else:
                cache.append(part)
        return *memory.tensors().values(), *(tensor.clone() for tensor in cache)


class StepGraph(nn.Module):
    """Tokens (M,), memory and cache of M hypotheses -> logits (M, V) and the next cache.

    Args:
        model: the captioner.
        state: one of its states, which shows the parts of the cache that are keys and values.
    """

    def __init__(self, model: CaptionModel, state: SharedState) -> None:
        super().__init__()
        self.model, self.kind, self.names = model, type(state.memory), list(state.memory.tensors())
        self.grows = [isinstance(part, KeyValues) for part in state.cache]

    def forward(
        self, tokens: Tensor, memory: Sequence[Tensor], cache: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Read one token for each hypothesis, which has its own row of the memory."""
        rest = iter(cache)
        rows: Memory = self.kind(**dict(zip(self.names, memory, strict=True)))
        state = SharedState(
            rows,
            torch.arange(tokens.shape[0]),
            tuple(
                GrowingKeyValues(next(rest), next(rest)) if grows else next(rest)
                for grows in self.grows
            ),
        )
        state.grouping = OwnRows()  # type: ignore[assignment]
        logits, after, _ = self.model.step(tokens, state)
        grown: list[Tensor] = []
        for part in after.cache:
            grown += part.tensors() if isinstance(part, GrowingKeyValues) else [part]
        return logits, *grown


class GrowingKeyValues:
    """``KeyValues`` for a graph: not written in place, for any number of earlier tokens.

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
        """As ``KeyValues.at_first``, decided at run time."""
        return torch.where(torch.full((), self.keys.shape[3]) == 0, first, later)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of all layers, including the new token."""
        keys, values = zip(*self.grown, strict=True)
        return torch.stack(keys), torch.stack(values)


class OwnRows:
    """``Grouping`` for one caption per image."""

    def gather(self, rows: Tensor) -> Tensor:
        """(M, ...) -> (M, 1, ...)."""
        return rows[:, None]

    def scatter(self, grouped: Tensor) -> Tensor:
        """(M, 1, ...) -> (M, ...)."""
        return grouped[:, 0]


# --- tracing


def write_graphs(folder: Path, model: CaptionModel, encoder: Encoder) -> None:
    """Trace the three graphs and write them."""
    batch, rows = torch.export.Dim("batch"), torch.export.Dim("rows")
    words = torch.export.Dim("words", max=longest_caption(model))
    size = encoder.preprocessing.size
    graph: nn.Module = EncoderGraph(encoder, model.feature)
    write_graph(
        folder / "encoder.onnx",
        graph,
        (torch.zeros(_EXAMPLES, size, size, 3, dtype=torch.uint8),),
        ({0: batch},),
        ["pixels"],
        ["features"],
    )
    features = torch.zeros(_EXAMPLES, *encoder.outputs[model.feature])
    memory = model.encode(features)
    names = [f"memory_{name}" for name in memory.tensors()]
    graph = MemoryGraph(model)
    first = graph(features)[len(names) :]
    caches = [f"cache_{i}" for i in range(len(first))]
    write_graph(
        folder / "memory.onnx", graph, (features,), ({0: batch},), ["features"], names + caches
    )
    # A growing cache (layers, M, heads, T, width) starts empty: trace it with words in it.
    state: Any = model.start(memory)
    grown = [c.new_zeros(*c.shape[:3], _WORDS, c.shape[4]) if c.ndim == 5 else c for c in first]
    sizes = tuple({1: rows, 3: words} if c.ndim == 5 else {1: rows} for c in first)
    write_graph(
        folder / "step.onnx",
        StepGraph(model, state),
        (torch.zeros(_EXAMPLES, dtype=torch.int64), tuple(memory.tensors().values()), tuple(grown)),
        ({0: rows}, tuple({memory.axis: rows} for _ in names), sizes),
        ["tokens", *names, *caches],
        ["logits", *(f"next_{name}" for name in caches)],
    )


def write_graph(
    path: Path,
    graph: nn.Module,
    inputs: Any,
    dynamic: Any,
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> None:
    """Trace ``graph`` on ``inputs``, with the dimensions in ``dynamic`` left open, and write it.

    Raises:
        CapGenError: it cannot be traced, or is too large.
    """
    before = logging.root.manager.disable
    try:
        with warnings.catch_warnings():  # the exporter's notes are for its own developers
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            program = torch.export.export(
                graph.eval(), inputs, dynamic_shapes=dynamic, strict=False
            )
            exported: Any = torch.onnx.export(
                program,
                input_names=list(input_names),
                output_names=list(output_names),
                dynamo=True,
                verbose=False,
                external_data=False,
            )
            exported.save(path, external_data=False)
    except Exception as error:  # exporters raise many kinds
        reason = " ".join(str(error).split())[:300]
        raise CapGenError(f"cannot write the ONNX graph {path.stem}: {reason}", INSTALL) from error
    finally:
        logging.disable(before)
    if path.stat().st_size > LARGEST:
        raise CapGenError(
            f"the {path.stem} is too large for one ONNX file", "export a smaller captioner"
        )


# --- the check


def compare(exported: OnnxCaptioner, model: CaptionModel, encoder: Encoder) -> dict[str, float]:
    """Compare graphs and captioner on the same noise: features, memory, and a few tokens.

    Returns:
        For each graph, the largest absolute difference.

    Raises:
        CapGenError: one differs by more than ``TOLERANCE`` of its largest output.
    """
    random, size = np.random.default_rng(0), encoder.preprocessing.size
    pairs: dict[str, list[tuple[np.ndarray, Tensor]]] = {name: [] for name in GRAPHS}
    for images in (_EXAMPLES, 1):
        pixels = random.integers(0, 256, (images, size, size, 3), dtype=np.uint8)
        features = encoder(torch.from_numpy(pixels))[model.feature].float()
        pairs["encoder"].append((exported.encode(pixels), features.half().float()))
        memory = model.encode(features)
        state: Any = model.start(memory)
        copy = exported.start(features.numpy())
        pairs["memory"] += [(copy.memory[f"memory_{n}"], t) for n, t in memory.tensors().items()]
        tokens = torch.full((images,), exported.specials.start)
        for _ in range(min(6, longest_caption(model))):
            logits, state, _ = model.step(tokens, state)
            scores, copy = copy.step(tokens.numpy())
            pairs["step"].append((scores, logits))
            tokens = logits.argmax(-1)
    largest = {}
    for name, both in pairs.items():
        scale = max(float(theirs.abs().max()) for _, theirs in both)
        largest[name] = max(float(np.abs(ours - theirs.numpy()).max()) for ours, theirs in both)
        if not largest[name] <= TOLERANCE * max(scale, 1.0):  # also true for NaN
            raise CapGenError(
                f"the exported {name} differs from torch's by {largest[name]:.2g}", INSTALL
            )
    return largest
