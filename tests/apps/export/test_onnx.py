"""Exported captioners give the same captions without torch; hostile exports are refused."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    PHOTOS,
    ROOT,
    VARIANTS,
    capgen,
    need,
    run_python,
    tiny_config,
    tiny_dual,
    tiny_model,
    tiny_shape,
    tiny_tokenizer,
)

from capgen_utils import Captioner
from capgen_utils.apps.export import numpy_search as numpy_decoding
from capgen_utils.apps.export.onnx_captioner import EXPORT_AGAIN, GRAPHS, OnnxCaptioner, read_info
from capgen_utils.bundle import Bundle, bundle_info, save_bundle
from capgen_utils.captioner import DEFAULT_BUNDLE
from capgen_utils.common.files import CapGenError, sha256_file
from capgen_utils.config import DecodingConfig
from capgen_utils.decoding.captions import Specials
from capgen_utils.decoding.options import check_decoding
from capgen_utils.decoding.search import decode
from capgen_utils.models import MODELS
from capgen_utils.vision.encoders import new_shapes_cnn

PATHS = sorted(PHOTOS.glob("*.jpg"))
SHIPPED = sorted(path.name for path in DEFAULT_BUNDLE.parent.iterdir() if path.is_dir())
WAYS: list[dict[str, Any]] = [
    {},
    {"beam": 1},
    {"beam": 5, "length_penalty": 1.5},
    {"beam": 3, "min_length": 5},
    {"beam": 4, "max_length": 3},
]


def export(bundle: Path, folder: Path) -> Path:
    need("onnx, onnxscript and onnxruntime", _has_packages())
    from capgen_utils.apps.export.onnx_graphs import export_onnx

    assert set(export_onnx(bundle, folder)) == set(GRAPHS)
    return folder


def _has_packages() -> bool:
    from importlib import util

    return all(util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


def save_bundle_of(folder: Path, model: str) -> Path:
    """Write a random bundle of any captioner: on the small CNN of ``shapes``, or on a CLIP that
    looks through it."""
    torch.manual_seed(0)  # also where a fixture of the whole module asks
    tokenizer, name = tiny_tokenizer(), VARIANTS.get(model, (model,))[0]
    output = MODELS[name].feature_of(tiny_config(model))
    encoder = tiny_dual().images if output == "embedding" else new_shapes_cnn(32)
    captioner = tiny_model(model, tokenizer, encoder.outputs[output])
    info = bundle_info(
        name, captioner, encoder, torch.float32, DecodingConfig(beam=2, max_length=8), "shapes"
    )
    save_bundle(folder, Bundle(captioner, tokenizer, info), encoder, torch.float32)
    return folder


def same_captions(
    bundle: Path,
    exported: Path,
    paths: list[Path],
    ways: list[dict[str, Any]],
    tolerance: float = 5e-2,
) -> None:
    with_torch, without = (
        Captioner.from_bundle(bundle, "cpu", fp32=True),
        OnnxCaptioner.from_folder(exported),
    )
    assert with_torch.features_dtype == without.features_dtype == "float32"
    for options in ways:
        expected, found = (
            with_torch.caption(paths, **options),
            without.caption(paths, batch_size=4, **options),
        )
        assert [c.text for c in found] == [c.text for c in expected], options
        for one, other in zip(found, expected, strict=True):
            assert (one.words, one.tokens, one.ended) == (other.words, other.tokens, other.ended)
            # Below the best one, captions of almost the same score may change places: features
            # differ by roundings.
            numbers = [
                [(c.log_probability, c.score) for c in caption.candidates]
                for caption in (one, other)
            ]
            assert np.allclose(*numbers, rtol=tolerance, atol=tolerance)
            assert abs(one.log_probability - other.log_probability) < tolerance
    assert len({caption.log_probability for caption in without.caption(paths)}) > 1, (
        "it looks at the images"
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small bundle, and its export."""
    folder = tmp_path_factory.mktemp("onnx")
    bundle = save_bundle_of(folder / "bundle", "transformer")
    need("onnx, onnxscript and onnxruntime", _has_packages())
    done = capgen("export", "--format", "onnx", "--bundle", bundle, "--output", folder / "exported")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and done.stdout.count("differs from torch by at most") == 3
    return bundle, folder / "exported"


def test_the_same_captions_with_and_without_torch(exported: tuple[Path, Path]) -> None:
    same_captions(*exported, PATHS, WAYS)


@pytest.mark.parametrize(
    "model", [*(name for name in MODELS if name != "transformer"), "clip_prefix, tower"]
)
def test_every_captioner_can_be_exported(model: str, tmp_path: Path) -> None:
    bundle = save_bundle_of(tmp_path / "bundle", model)
    same_captions(bundle, export(bundle, tmp_path / "exported"), PATHS[:5], WAYS[:3])


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_captioners_give_the_same_captions_without_torch(
    name: str, tmp_path: Path
) -> None:
    bundle = DEFAULT_BUNDLE.parent / name
    need("the trained captioner that ships", (bundle / "model.safetensors").is_file())
    same_captions(bundle, export(bundle, tmp_path / "exported"), PATHS, WAYS[:3], 1e-3)


NO_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("torch", "torchvision", "transformers", "timm", "safetensors"):
            raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, Refuse())
"""


def test_nothing_imports_torch(exported: tuple[Path, Path]) -> None:
    _, folder = exported
    code = NO_TORCH + (
        "from capgen_utils.apps.export.onnx_captioner import OnnxCaptioner\n"
        f"captioner = OnnxCaptioner.from_folder({str(folder)!r})\n"
        f"print(captioner.caption({str(PATHS[0])!r})[0].text)\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    said = OnnxCaptioner.from_folder(folder).caption(PATHS[0])[0].text
    assert done.stdout.strip() == said
    arguments = ["caption", str(PATHS[0]), "--onnx", str(folder)]
    line = f"from capgen_utils.apps.cli.main import main\nsys.exit(main({arguments}))"
    done = run_python("-c", NO_TORCH + line)
    assert (done.returncode, done.stdout.strip()) == (0, said), done.stderr
    refused = run_python("-c", NO_TORCH + "import capgen_utils.captioner")
    assert refused.returncode == 1 and "torch is not here" in refused.stderr, (
        "the guard itself works"
    )


def test_the_command_line_writes_captions_and_names_bad_images(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    bundle, folder = exported
    (tmp_path / "bad.jpg").write_text("no image")
    output = tmp_path / "captions.jsonl"
    arguments = [
        "caption",
        "--onnx",
        folder,
        PATHS[0],
        tmp_path / "bad.jpg",
        PATHS[1],
        "--output",
        output,
    ]
    done = capgen(*arguments)
    assert done.returncode == 1 and "bad.jpg" in done.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["caption"] for row in rows] == [
        c.text for c in OnnxCaptioner.from_folder(folder).caption(PATHS[:2])
    ]
    assert (
        capgen(*arguments, "--resume").returncode == 1 and len(output.read_text().splitlines()) == 2
    )
    for extra in (["--rerank"], ["--bundle", str(bundle)]):
        refused = capgen("caption", PATHS[0], "--onnx", folder, *extra)
        assert (
            refused.returncode == 2
            and extra[0] in refused.stderr
            and "Traceback" not in refused.stderr
        )
    for extra in (["--temperature", "1"], ["--groups", "2"], ["--beam", "1000"]):
        assert capgen("caption", PATHS[0], "--onnx", folder, *extra).returncode == 2


def test_the_export_reports_its_difference_from_torch(exported: tuple[Path, Path]) -> None:
    _, folder = exported
    described = json.loads((folder / "config.json").read_text())
    assert set(described["check"]) == set(GRAPHS)
    assert all(0 <= value < 1e-2 for value in described["check"].values())
    assert described["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["config.json", "tokenizer.json", *(f"{name}.onnx" for name in GRAPHS)]
    )


def test_a_graph_that_computes_something_else_is_not_written(
    exported: tuple[Path, Path],
) -> None:
    from capgen_utils.apps.export import onnx_graphs as onnx_export

    bundle, folder = exported
    model = Captioner.from_bundle(bundle, "cpu")
    with torch.no_grad():
        model.model.output_bias.add_(torch.arange(float(len(model.tokenizer))))
    with (
        pytest.raises(CapGenError, match="the exported step differs from torch's by"),
        torch.no_grad(),
    ):
        onnx_export.compare(OnnxCaptioner.from_folder(folder), model.model, model.encoder)


def test_the_output_may_not_be_the_bundle_or_a_file(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    bundle, _ = exported
    (tmp_path / "file").write_text("")
    for output in (bundle, bundle / "onnx", tmp_path / "file"):
        done = capgen("export", "--format", "onnx", "--bundle", bundle, "--output", output)
        assert done.returncode == 2 and "->" in done.stderr
    assert Captioner.from_bundle(bundle).caption(PATHS[0])


# --- hostile folders


@pytest.fixture
def copied(exported: tuple[Path, Path], tmp_path: Path) -> Path:
    shutil.copytree(exported[1], tmp_path / "copy")
    return tmp_path / "copy"


def refused(folder: Path) -> str:
    with pytest.raises(CapGenError) as error:
        OnnxCaptioner.from_folder(folder)
    return error.value.problem


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


BAD_VALUES: list[dict[str, Any]] = [
    {"version": 2},
    {"version": None},
    {"format": "hub"},
    {"graphs": {}},
    {"graphs": None},
    {"longest": 0},
    {"longest": 10**9},
    {"longest": "8"},
    {"vocabulary": 13},
    {"vocabulary": -1},
    {"vocabulary": True},
    {"memory_axis": 7},
    {"feature_shape": [10**9]},
    {"feature_shape": []},
    {"feature_shape": "64"},
    {"check": []},
    {"check": {"step": "small"}},
    {"decoding": {"beam": 0}},
    {"decoding": {"beam": "two"}},
    {"decoding": []},
    {"decoding": {"beam": 2, "max_length": 10**6}},
    {"decoding": {"unknown": 1}},
    {"preprocessing": None},
    {"preprocessing": {"size": 10**6, "resize": "squash", "mean": [0, 0, 0], "std": [1, 1, 1]}},
    {"model": 3},
    {"preprocessing": {"size": 32, "resize": "squash", "mean": [0, 0, 0], "std": [1, 1, 1]}},
    {"feature_shape": [63, 32]},
]


@pytest.mark.parametrize("values", BAD_VALUES, ids=str)
def test_a_configuration_that_is_not_possible_is_refused(
    copied: Path, values: dict[str, Any]
) -> None:
    change(copied, **values)
    assert refused(copied)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", *(f"{name}.onnx" for name in GRAPHS)]
)
def test_missing_and_damaged_files_are_named(copied: Path, name: str) -> None:
    content = (copied / name).read_bytes()
    for damaged in (
        None,
        b"",
        content[:-7],
        content[: len(content) // 2] + b"!" + content[len(content) // 2 + 1 :],
    ):
        (copied / name).unlink() if damaged is None else (copied / name).write_bytes(damaged)
        assert name in refused(copied)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "no folder" in refused(tmp_path / "gone")


def describe_again(folder: Path) -> None:
    """Write sizes and hashes of changed graphs into the configuration, as someone would who means
    harm."""
    graphs = {
        n: {"bytes": (p := folder / f"{n}.onnx").stat().st_size, "sha256": sha256_file(p)}
        for n in GRAPHS
    }
    change(folder, graphs=graphs)


def swap_step_for_memory(folder: Path) -> None:
    shutil.copyfile(folder / "memory.onnx", folder / "step.onnx")


def write_nonsense(folder: Path) -> None:
    (folder / "step.onnx").write_bytes(b"\x08\x09not a graph" * 100)


def name_another_file(folder: Path) -> None:
    import onnx

    path = folder / "encoder.onnx"
    graph = onnx.load(path)
    weights = max(graph.graph.initializer, key=lambda one: len(one.raw_data))
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.ClearField("raw_data")
    weights.external_data.add(key="location", value="../../secret")
    path.write_bytes(graph.SerializeToString())


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (swap_step_for_memory, "do not match"),
        (write_nonsense, "ONNX Runtime cannot load"),
        (name_another_file, "other files"),
    ],
)
def test_malicious_graphs_are_refused(
    copied: Path, harm: Callable[[Path], None], problem: str
) -> None:
    harm(copied)
    describe_again(copied)
    assert problem in refused(copied)


def test_a_graph_that_fails_on_an_image_is_an_error_with_a_remedy(
    exported: tuple[Path, Path],
) -> None:
    captioner = OnnxCaptioner.from_folder(exported[1])
    with pytest.raises(CapGenError) as error:
        captioner.encode(np.zeros((1, 5, 5, 3), dtype=np.uint8))
    assert error.value.remedy == EXPORT_AGAIN


def test_the_configuration_is_read_as_it_was_written(exported: tuple[Path, Path]) -> None:
    info = read_info(json.loads((exported[1] / "config.json").read_text()), exported[1])
    assert (info.model, info.encoder, info.feature_shape) == ("transformer", "shapes_cnn", (64, 32))
    assert info.decoding.beam == 2 and info.longest == tiny_config().seq_len - 1


# --- the search alone


class TorchState:
    """A torch captioner's state as ``numpy_decoding`` wants it, so that the searches can be
    compared alone."""

    def __init__(self, model: Any, state: Any) -> None:
        self.model, self.state = model, state

    def step(self, tokens: np.ndarray) -> tuple[np.ndarray, "TorchState"]:
        logits, state, _ = self.model.step(torch.from_numpy(tokens), self.state)
        return logits.numpy(), TorchState(self.model, state)

    def select(self, rows: np.ndarray) -> "TorchState":
        return TorchState(self.model, self.state.select(torch.from_numpy(rows)))


CONFIGS = [
    DecodingConfig(beam=beam, max_length=length, min_length=least, length_penalty=penalty)
    for beam, length, least, penalty in [
        (1, 12, 0, 1.0),
        (1, 1, 0, 1.0),
        (1, 12, 3, 0.0),
        (2, 12, 0, 0.0),
        (3, 4, 3, 1.0),
        (3, 12, 3, -1.0),
        (7, 12, 0, 1.0),
        (7, 1, 0, 1.0),
        (20, 4, 0, 0.5),
    ]
]


@pytest.mark.parametrize("model", ["attend_tell", "transformer"])
@torch.inference_mode()
def test_the_search_in_numpy_is_the_search_in_torch(model: str) -> None:
    tokenizer = tiny_tokenizer()
    captioner, specials = tiny_model(model, tokenizer), Specials.of(tokenizer)
    memory = captioner.encode(torch.randn(6, *tiny_shape(model)))
    for config in CONFIGS:
        expected = decode(captioner, memory, 6, specials, config)
        found = numpy_decoding.search(
            TorchState(captioner, captioner.start(memory)), 6, specials, config
        )
        assert [[(h.tokens, h.ended) for h in one] for one in found] == [
            [(h.tokens, h.ended) for h in one] for one in expected
        ], config
        numbers = [
            [(h.log_probability, h.score) for one in both for h in one]
            for both in (found, expected)
        ]
        assert np.allclose(*numbers, atol=1e-4)


@torch.inference_mode()
def test_a_search_without_allowed_tokens_is_cut_short() -> None:
    tokenizer = tiny_tokenizer(1)
    captioner = tiny_model("transformer", tokenizer)
    specials = replace(
        Specials.of(tokenizer),
        banned=tuple(i for i in range(len(tokenizer)) if i != tokenizer.end_id),
    )
    memory = captioner.encode(torch.randn(2, *tiny_shape("transformer")))
    for beam in (1, 2):
        config = check_decoding(DecodingConfig(beam=beam, max_length=4, min_length=2))
        expected = decode(captioner, memory, 2, specials, config)
        found = numpy_decoding.search(
            TorchState(captioner, captioner.start(memory)), 2, specials, config
        )
        assert [[(h.tokens, h.ended) for h in one] for one in found] == [
            [(h.tokens, h.ended) for h in one] for one in expected
        ]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"groups": 2, "beam": 2},
        {"no_repeat_ngram": 2},
        {"repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_what_needs_torch_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(CapGenError, match="without torch"):
        numpy_decoding.require_search(DecodingConfig(**options))


def test_the_extra_names_the_packages() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert {line.split(">=")[0] for line in extras["onnx"]} == {"onnx", "onnxscript", "onnxruntime"}
    assert re.search(r"capgen-utils\[.*\bonnx\b", "".join(extras["dev"]))
