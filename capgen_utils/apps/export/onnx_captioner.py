"""A captioner that needs no torch: ONNX Runtime runs its networks, numpy its beam search.

``capgen export --format onnx`` writes its folder: ``config.json``, ``tokenizer.json`` and three
graphs.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from capgen_utils.apps.export.numpy_search import require_search, search
from capgen_utils.common.files import CapGenError, from_dict, read_json, sha256_file
from capgen_utils.config import DecodingConfig
from capgen_utils.data.images import ImageLike, is_many, open_image
from capgen_utils.decoding.captions import Caption, Specials, caption_of
from capgen_utils.decoding.options import check_decoding, with_options
from capgen_utils.text.vocabulary import tokenizer_from_json
from capgen_utils.text.words import Tokenizer
from capgen_utils.vision.preprocessing import Preprocessing, preprocessing_from_json

VERSION = 1
GRAPHS = ("encoder", "memory", "step")
LARGEST = 2**31  # bytes of a graph: the largest file that ONNX allows
EXPORT_AGAIN = (
    "export the bundle again: capgen export --format onnx --bundle BUNDLE --output FOLDER"
)
EXTERNAL_FILE = b"\x0a\x08location"  # marks the name of another file that a graph reads


@dataclass(frozen=True)
class ExportInfo:
    """The contents of ``config.json`` of an export.

    Attributes:
        model: name of the captioner.
        encoder: name of the image encoder.
        preprocessing: of images.
        decoding: default decoding.
        longest: longest caption in tokens, end token included.
        vocabulary: number of tokens V.
        feature_shape: of one image's features.
        memory_axis: the batch dimension of memory tensors.
        check: for each graph, the largest absolute difference from torch, measured at export.
    """

    model: str
    encoder: str
    preprocessing: Preprocessing
    decoding: DecodingConfig
    longest: int
    vocabulary: int
    feature_shape: tuple[int, ...]
    memory_axis: int
    check: Mapping[str, float]


class OnnxCaptioner:
    """Captions photographs as ``captioner.Captioner`` does, without torch.

    >>> captioner = OnnxCaptioner.from_folder("exported")  # doctest: +SKIP
    >>> captioner.caption("data/photos/cat_on_deck.jpg")[0].text  # doctest: +SKIP
    """

    features_dtype = "float32"  # of its encoder

    def __init__(
        self, info: ExportInfo, tokenizer: Tokenizer, sessions: Mapping[str, Any], folder: Path
    ) -> None:
        self.info, self.tokenizer, self.sessions = info, tokenizer, sessions
        self.decoding, self.longest, self.folder = info.decoding, info.longest, folder
        self.specials = Specials.of(tokenizer)

    @classmethod
    def from_folder(cls, folder: str | Path, threads: int | None = None) -> "OnnxCaptioner":
        """Load an export.

        Args:
            folder: written by ``capgen export --format onnx``.
            threads: CPU threads; by default ``OMP_NUM_THREADS``, else one per core.

        Raises:
            CapGenError: onnxruntime is not installed, or a file is missing, damaged, or does not
                match the others.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CapGenError(
                f"there is no folder {folder} with an exported captioner", EXPORT_AGAIN
            )
        raw = read_json(folder / "config.json", EXPORT_AGAIN)
        info = read_info(raw, folder)
        tokenizer = tokenizer_from_json(read_json(folder / "tokenizer.json", EXPORT_AGAIN))
        if len(tokenizer) != info.vocabulary:
            raise CapGenError(f"{folder}: tokenizer.json does not match config.json", EXPORT_AGAIN)
        sessions = {
            name: open_graph(folder / f"{name}.onnx", raw["graphs"][name], threads)
            for name in GRAPHS
        }
        check_graphs(sessions, info, folder)
        return cls(info, tokenizer, sessions, folder)

    def caption(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        batch_size: int = 32,
        **options: Any,
    ) -> list[Caption]:
        """Caption one image or many; see ``Captioner.caption``.

        Args:
            images: a path, PIL image or array (H, W, 3), or a sequence of them.
            batch_size: images that go through the networks together.
            options: ``beam``, ``max_length``, ``min_length``, ``length_penalty`` and
                ``candidates``.

        Raises:
            CapGenError: an image cannot be read, or an option is not possible without torch.
        """
        many: Sequence[Any] = images if is_many(images) else [images]  # type: ignore[assignment]
        decoding, captions = self._decoding(options), list[Caption]()
        for start in range(0, len(many), batch_size):
            batch = many[start : start + batch_size]
            captions += self._caption_pixels(
                [self.info.preprocessing(open_image(image)) for image in batch], decoding
            )
        return captions

    def caption_each(
        self,
        paths: Sequence[Path],
        *,
        batch_size: int = 32,
        rerank: bool = False,
        **options: Any,
    ) -> Iterator[tuple[Path, Caption | CapGenError]]:
        """Caption many files, yielding each with its caption or the error of its image."""
        if rerank:
            raise CapGenError(
                "an exported captioner has no CLIP for re-ranking", "use the bundle instead"
            )
        decoding = self._decoding(options)
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            pixels, errors = list[np.ndarray](), dict[Path, CapGenError]()
            for path in batch:
                try:
                    pixels.append(self.info.preprocessing(open_image(path)))
                except CapGenError as error:
                    errors[path] = error
            captions = iter(self._caption_pixels(pixels, decoding) if pixels else ())
            yield from ((path, errors.get(path) or next(captions)) for path in batch)

    def _decoding(self, options: dict[str, Any]) -> DecodingConfig:
        decoding = check_decoding(with_options(self.decoding, **options), self.longest)
        require_search(decoding)
        return decoding

    def _caption_pixels(
        self, pixels: Sequence[np.ndarray], decoding: DecodingConfig
    ) -> list[Caption]:
        state = self.start(self.encode(np.stack(pixels)))
        return [
            caption_of(self.tokenizer, hypotheses)
            for hypotheses in search(state, len(pixels), self.specials, decoding)
        ]

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels (B, size, size, 3), uint8 -> features (B, ...), rounded to float16 as a feature
        cache holds them."""
        outputs = run(self.sessions["encoder"], {"pixels": np.ascontiguousarray(pixels)})
        return outputs["features"].astype(np.float16).astype(np.float32)

    def start(self, features: np.ndarray) -> "OnnxState":
        """Features (B, ...) -> the state before the first token, one hypothesis per image."""
        tensors = run(self.sessions["memory"], {"features": features})
        return OnnxState(
            self.sessions["step"],
            self.info.memory_axis,
            {name: value for name, value in tensors.items() if name.startswith("memory")},
            {name: value for name, value in tensors.items() if name.startswith("cache")},
            np.arange(len(features)),
        )


@dataclass
class OnnxState:
    """The state of decoding, see ``models.base.SharedState``; each hypothesis has its own memory.

    Attributes:
        session: the graph ``step``.
        axis: the batch dimension of memory tensors.
        memory: name -> tensor.
        cache: name -> tensor (layers, M, ...).
        image: (M,), index of each hypothesis' image.
    """

    session: Any
    axis: int
    memory: dict[str, np.ndarray]
    cache: dict[str, np.ndarray]
    image: np.ndarray

    def step(self, tokens: np.ndarray) -> tuple[np.ndarray, "OnnxState"]:
        """Read ``tokens`` (M,); logits (M, V), and the state after them."""
        values = {"tokens": tokens} | self.memory | self.cache
        inputs = {node.name: values[node.name] for node in self.session.get_inputs()}
        outputs = run(self.session, inputs)
        cache = {name: outputs[f"next_{name}"] for name in self.cache}
        return outputs["logits"], replace(self, cache=cache)

    def select(self, rows: np.ndarray) -> "OnnxState":
        """Return the state of hypotheses ``rows``; memory is copied only if their images change."""
        cache = {name: value.take(rows, axis=1) for name, value in self.cache.items()}
        image, memory = self.image[rows], self.memory
        if not np.array_equal(image, self.image):
            memory = {name: value.take(rows, axis=self.axis) for name, value in memory.items()}
        return replace(self, memory=memory, cache=cache, image=image)


# --- files that may come from anywhere


def read_info(value: Any, folder: Path) -> ExportInfo:
    """Check ``config.json`` of an export.

    Raises:
        CapGenError: another version, or values that are missing or out of range.
    """
    value = value if isinstance(value, dict) else {}
    if value.get("format") != "onnx" or value.get("version") != VERSION:
        raise CapGenError(
            f"{folder} is not a captioner exported as ONNX, version {VERSION}", EXPORT_AGAIN
        )
    shape, graphs, check = value.get("feature_shape"), value.get("graphs"), value.get("check")
    possible = (
        all(isinstance(value.get(key), str) for key in ("model", "encoder"))
        and all(
            _is_count(value.get(key), most)
            for key, most in (("longest", 2**16), ("vocabulary", 10**6))
        )
        and value.get("memory_axis") in (0, 1)
        and isinstance(shape, list)
        and 1 <= len(shape) <= 3
        and all(_is_count(n, 10**5) for n in shape)
        and isinstance(graphs, dict)
        and all(isinstance(graphs.get(name), dict) for name in GRAPHS)
        and all(_is_count(graphs[name].get("bytes"), LARGEST) for name in GRAPHS)
        and all(isinstance(graphs[name].get("sha256"), str) for name in GRAPHS)
        and isinstance(check, dict)
        and all(isinstance(n, float) for n in check.values())
        and isinstance(value.get("decoding"), dict)
    )
    if not possible:
        raise CapGenError(f"{folder}/config.json holds values that are out of range", EXPORT_AGAIN)
    read = {
        "preprocessing": preprocessing_from_json(value.get("preprocessing")),
        "decoding": check_decoding(from_dict(DecodingConfig, value["decoding"]), value["longest"]),
        "feature_shape": tuple(shape),
    }
    return ExportInfo(**{f.name: value.get(f.name) for f in fields(ExportInfo)} | read)


def _is_count(value: Any, most: int) -> bool:
    return type(value) is int and 0 < value <= most


def open_graph(path: Path, described: Mapping[str, Any], threads: int | None = None) -> Any:
    """Return an ``onnxruntime.InferenceSession``.

    Args:
        path: of the graph.
        described: its ``bytes`` and ``sha256``.
        threads: see ``OnnxCaptioner.from_folder``.

    Raises:
        CapGenError: onnxruntime is not installed, or the file is missing, changed, refers to other
            files, or is not a graph.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise CapGenError("onnxruntime is not installed", "run: pip install onnxruntime") from error
    if (
        not path.is_file()
        or path.stat().st_size != described["bytes"]
        or sha256_file(path) != described["sha256"]
    ):
        raise CapGenError(f"{path} is missing or damaged", EXPORT_AGAIN)
    content = path.read_bytes()
    if EXTERNAL_FILE in content:
        raise CapGenError(f"{path} refers to other files", EXPORT_AGAIN)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or int(os.environ.get("OMP_NUM_THREADS") or 0)
    options.log_severity_level = 3  # errors
    try:
        return onnxruntime.InferenceSession(
            content, options, providers=onnxruntime.get_available_providers()
        )
    except Exception as error:  # the library has no common class of errors
        raise CapGenError(
            f"ONNX Runtime cannot load {path}: {_brief(error)}", EXPORT_AGAIN
        ) from error


def run(session: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a graph and return its outputs by name.

    Raises:
        CapGenError: it fails on these inputs.
    """
    names = [node.name for node in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))
    except Exception as error:
        raise CapGenError(f"the exported graph failed: {_brief(error)}", EXPORT_AGAIN) from error


def check_graphs(sessions: Mapping[str, Any], info: ExportInfo, folder: Path) -> None:
    """Compare inputs and outputs of the graphs with each other and with ``config.json``.

    Raises:
        CapGenError: they do not match.
    """
    ins, outs = (
        {
            name: {
                node.name: [n if isinstance(n, int) else None for n in node.shape]
                for node in getattr(session, method)()
            }
            for name, session in sessions.items()
        }
        for method in ("get_inputs", "get_outputs")
    )
    side, carried = info.preprocessing.size, set(outs["memory"])
    grown = {f"next_{name}" for name in carried if name.startswith("cache_")}
    match = (
        ins["encoder"] == {"pixels": [None, side, side, 3]}
        and list(outs["encoder"]) == ["features"]
        and ins["memory"] == {"features": [None, *info.feature_shape]}
        and all(name.startswith(("memory_", "cache_")) for name in carried)
        and {"tokens"} <= set(ins["step"]) <= {"tokens"} | carried
        and outs["step"].get("logits") == [None, info.vocabulary]
        and set(outs["step"]) == {"logits"} | grown
    )
    if not match:
        raise CapGenError(
            f"{folder}: the graphs do not match each other or config.json", EXPORT_AGAIN
        )


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
