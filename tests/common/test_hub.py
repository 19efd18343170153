"""Models by hub name or from a folder: strict, never a pickle, and quick to say what is missing."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_helpers import (
    POSITIONS,
    WIDTH,
    published_config,
    published_weights,
    write_gpt2,
)
from safetensors.torch import save_file

from capgen_utils.common.files import CapGenError
from capgen_utils.common.hub import load_pretrained, read_config

REMEDY = "one way, another way, a third way"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in the hub's layout."""
    return write_gpt2(tmp_path)


def test_a_folder_in_the_hubs_layout_is_loaded_to_the_bit(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = load_pretrained("GPT2LMHeadModel", folder, REMEDY)
    weights = published_weights()
    own = model.transformer.state_dict()
    assert set(own) == {
        name for name in weights if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }
    assert all(torch.equal(own[name], weights[name]) for name in own)
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    assert not model.training and model.dtype == torch.float32
    assert capfd.readouterr() == ("", ""), "no reports of the library"


def test_half_precision_becomes_single_precision(folder: Path) -> None:
    halves = {name: tensor.half() for name, tensor in published_weights().items()}
    save_file(halves, folder / "model.safetensors", {"format": "pt"})
    assert load_pretrained("GPT2LMHeadModel", str(folder), REMEDY).dtype == torch.float32


def spoil(folder: Path, how: str) -> None:
    weights = published_weights()
    if how == "missing weight":
        del weights["h.1.mlp.c_fc.bias"]
    elif how == "left over":
        weights["h.0.adapter.weight"] = torch.zeros(3)
    elif how == "more layers":
        weights |= {
            name.replace("h.1.", "h.2."): t.clone()
            for name, t in weights.items()
            if name.startswith("h.1.")
        }
    elif how == "wrong shape":
        weights["wpe.weight"] = torch.zeros(POSITIONS + 1, WIDTH)
    elif how == "not finite":
        weights["ln_f.weight"][3] = torch.nan
    elif how == "another model":
        (folder / "config.json").write_text(json.dumps(published_config(model_type="bert")))
    elif how == "config no JSON":
        (folder / "config.json").write_text("{")
    elif how == "config a list":
        (folder / "config.json").write_text("[]")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    if how == "damaged":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    elif how in ("no weights", "no config"):
        (folder / {"no weights": "model.safetensors", "no config": "config.json"}[how]).unlink()


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("missing weight", "h.1.mlp.c_fc.bias"),
        ("left over", "adapter"),
        ("more layers", "h.2."),
        ("wrong shape", "wpe.weight|size|shape"),
        ("not finite", "finite"),
        ("another model", "bert"),
        ("config no JSON", "gpt2-tiny"),
        ("config a list", "describe"),
        ("damaged", "gpt2-tiny"),
        ("no weights", "gpt2-tiny"),
        ("no config", "config.json"),
    ],
)
def test_anything_else_is_refused_with_the_ways_to_provide_it(
    folder: Path, how: str, named: str
) -> None:
    spoil(folder, how)
    with pytest.raises(CapGenError, match=named) as error:
        load_pretrained("GPT2LMHeadModel", folder, REMEDY)
    assert error.value.remedy == REMEDY


@pytest.mark.parametrize(
    "source", [Path("no/such/folder"), Path("gpt2"), "no/such/folder", "../gpt2", "a b", ""]
)
def test_a_missing_folder_is_not_asked_of_the_hub(
    source: str | Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "capgen_utils.common.hub._fetch", lambda *_: pytest.fail("the hub was asked")
    )
    with pytest.raises(CapGenError, match="neither an existing folder nor the name") as error:
        read_config(source, REMEDY)
    assert error.value.remedy == REMEDY


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Be without a network, and with an empty cache of the hub; counts how often a name was looked
    up."""
    import huggingface_hub.constants

    calls = []

    def no_network(*arguments: Any, **_: Any) -> None:
        calls.append(arguments)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return calls


@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_out_of_reach_is_asked_once(
    offline: bool, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(
        huggingface_hub.constants, "HF_HUB_OFFLINE", offline
    )  # what the variable of that name sets
    with pytest.raises(CapGenError, match="capgen-tests/gpt2-tiny") as error:
        load_pretrained("GPT2LMHeadModel", "capgen-tests/gpt2-tiny", REMEDY)
    assert error.value.remedy == REMEDY
    assert len(asked) <= (0 if offline else 2), "no retries"


def test_a_model_in_the_hubs_cache_needs_no_network(
    folder: Path, asked: list[Any], tmp_path: Path
) -> None:
    cached = tmp_path / "cache" / "models--capgen-tests--gpt2-tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("a" * 40)
    shutil.copytree(folder, cached / "snapshots" / ("a" * 40))
    model = load_pretrained("GPT2LMHeadModel", "capgen-tests/gpt2-tiny", REMEDY)
    assert torch.equal(model.transformer.wpe.weight, published_weights()["wpe.weight"])
    (cached / "snapshots" / ("a" * 40) / "model.safetensors").unlink()
    with pytest.raises(CapGenError, match="capgen-tests/gpt2-tiny"):
        load_pretrained("GPT2LMHeadModel", "capgen-tests/gpt2-tiny", REMEDY)


class Evil:
    """What runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "run")


@pytest.mark.parametrize("evil", [False, True])
def test_a_bin_file_is_read_as_tensors_only(folder: Path, evil: bool) -> None:
    (folder / "model.safetensors").unlink()
    content: dict[str, Any] = published_weights()
    trace = folder / "trace"
    if evil:
        content["h.0.ln_1.bias"] = Evil(trace)
    torch.save(content, folder / "pytorch_model.bin")
    if not evil:
        assert load_pretrained("GPT2LMHeadModel", folder, REMEDY).config.n_embd == WIDTH
        return
    with pytest.raises(CapGenError) as error:
        load_pretrained("GPT2LMHeadModel", folder, REMEDY)
    assert error.value.remedy == REMEDY
    assert not trace.exists()
