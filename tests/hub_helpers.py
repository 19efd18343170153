"""Shared by tests of pretrained models: a small GPT-2 in the hub's layout."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from capgen_utils.common.hub import import_torchvision

WIDTH, LAYERS, POSITIONS, VOCABULARY = 16, 2, 12, 20


def gpt2_class() -> Any:
    import_torchvision()
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel


def published_weights() -> dict[str, Tensor]:
    """Return a small GPT-2 as the hub has it: without a prefix or a head, with the causal masks of
    old releases."""
    from transformers import GPT2Config

    kind = gpt2_class()
    torch.manual_seed(1)
    config = GPT2Config(
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=4,
        n_positions=POSITIONS,
        vocab_size=VOCABULARY,
        bos_token_id=None,
        eos_token_id=None,
    )
    weights = {
        name: tensor.clone() for name, tensor in kind(config).transformer.state_dict().items()
    }
    mask = torch.ones(1, 1, POSITIONS, POSITIONS).tril()
    masks = {f"h.{i}.attn.bias": mask.clone() for i in range(LAYERS)}
    return weights | masks | {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(LAYERS)}


def published_config(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_positions": POSITIONS,
        "n_ctx": POSITIONS,
        "vocab_size": VOCABULARY,
        "bos_token_id": 19,
        "eos_token_id": 19,
    } | changes


def write_gpt2(folder: Path) -> Path:
    """Write a small GPT-2 in the hub's layout and return its folder."""
    target = folder / "gpt2-tiny"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(published_config()))
    save_file(published_weights(), target / "model.safetensors", {"format": "pt"})
    return target
