"""CLIP + GPT-2: parameter counts, equality with the library, frozen parts and options."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, tiny_config, tiny_data, tiny_encoder, tiny_model, tiny_tokenizer
from torch import Tensor, nn

from capgen_utils.bundle import Bundle, bundle_info, load_bundle, save_bundle
from capgen_utils.common.files import CapGenError
from capgen_utils.common.hub import import_torchvision
from capgen_utils.config import ClipGpt2Config, DecodingConfig, TrainingConfig
from capgen_utils.decoding.captions import Specials
from capgen_utils.decoding.search import decode
from capgen_utils.models.base import caption_loss
from capgen_utils.models.clip_gpt2 import ClipGpt2Captioner, gpt2_config
from capgen_utils.presets import PRESETS
from capgen_utils.training.trainer import Trainer

PUBLISHED = ClipGpt2Config(gate=False, tied_head=False, reduction=1)  # GPT-2 medium
FULL_TABLE, CLIP_GRID = 50_257, (257, 1024)  # of GPT-2, and of CLIP ViT-L/14
IMAGE = torch.tensor([0, 0, 1, 2, 2])


def meta(
    config: ClipGpt2Config, vocabulary: int = FULL_TABLE, grid: tuple[int, int] = CLIP_GRID
) -> ClipGpt2Captioner:
    """Return a captioner without memory for its weights."""
    with torch.device("meta"):
        return ClipGpt2Captioner(config, vocabulary, grid, 0)


def count(module: nn.Module, trainable: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def inputs(vocabulary: int = 16, length: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, 9, 12, generator=generator), torch.randint(
        0, vocabulary, (5, length), generator=generator
    )


def library_model(captioner: ClipGpt2Captioner, **more: Any) -> Any:
    """Return the library's GPT-2 with the captioner's weights."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel(
        gpt2_config(captioner.config, len(captioner.output_bias), **more)
    ).eval()
    model.transformer.load_state_dict(captioner.gpt2.state_dict(), strict=not more)
    return model


def plain(**changes: Any) -> ClipGpt2Captioner:
    """Return an untrained captioner whose words vary, and whose gates, where it has any, are
    closed."""
    captioner = tiny_model("clip_gpt2", **changes)
    assert isinstance(captioner, ClipGpt2Captioner)
    for name, parameter in captioner.named_parameters():
        if name.endswith(".gate"):
            nn.init.zeros_(parameter)
        elif "attn" in name or "mlp" in name:
            nn.init.normal_(parameter, std=0.3)
    captioner.start_head()
    return captioner


# --- the published configuration


def test_the_published_configuration_has_the_published_counts() -> None:
    import_torchvision()
    from transformers import CLIPVisionConfig, CLIPVisionModel

    captioner = meta(PUBLISHED)
    with torch.device("meta"):
        tower = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                patch_size=14,
            )
        )
    assert [m.num_positions for m in tower.modules() if hasattr(m, "num_positions")] == [
        CLIP_GRID[0]
    ]
    assert count(tower) == 303_179_776
    assert count(captioner.gpt2) == 354_823_168
    norms = sum(count(cross.norm) for cross in captioner.cross)
    assert norms == 49_152
    assert count(captioner.cross) - norms + count(captioner.cross_keys_values) == 100_761_600
    assert count(captioner.head) + captioner.output_bias.numel() == 51_513_425
    assert count(tower) + count(captioner) == 810_327_121
    assert count(captioner, trainable=True) == 353_822_801


def test_every_layer_has_four_linear_maps_with_biases() -> None:
    one, two = (count(meta(replace(PUBLISHED, n_layer=n)), True) for n in (1, 2))
    mlp = 2 * 1024 * 4096 + 4096 + 1024
    assert two - one == 4 * 1_049_600 + 2 * 1024 + (mlp + 2 * 1024)


def published_shapes(
    layers: int, width: int, positions: int = 1024, vocabulary: int = FULL_TABLE
) -> dict[str, Any]:
    """Return names and shapes in a published checkpoint of GPT-2, whose layers also hold their
    causal masks."""
    shapes: dict[str, Any] = {"wte.weight": (vocabulary, width), "wpe.weight": (positions, width)}
    for i in range(layers):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{norm}.weight": (width,), f"h.{i}.{norm}.bias": (width,)}
        maps = {
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (width, 4 * width),
            "mlp.c_proj": (4 * width, width),
        }
        for name, shape in maps.items():
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[1:]}
        shapes[f"h.{i}.attn.bias"] = (1, 1, positions, positions)
    return shapes | {"ln_f.weight": (width,), "ln_f.bias": (width,)}


@pytest.mark.parametrize(
    ("layers", "width", "heads", "tensors"), [(12, 768, 12, 160), (24, 1024, 16, 316)]
)
def test_names_and_shapes_are_those_of_the_published_checkpoints(
    layers: int, width: int, heads: int, tensors: int
) -> None:
    published = published_shapes(layers, width)
    assert len(published) == tensors
    captioner = meta(ClipGpt2Config(n_embd=width, n_layer=layers, n_head=heads))
    own = {name: tuple(tensor.shape) for name, tensor in captioner.gpt2.state_dict().items()}
    assert own == {
        name: shape for name, shape in published.items() if not name.endswith(".attn.bias")
    }


def test_the_published_setting_trains_on_a_gpu_of_16_gb() -> None:
    recipe = PRESETS["coco"].recipe("clip_gpt2")
    captioner, images = meta(recipe.config).train(), recipe.training.batch_images
    weights = {parameter.untyped_storage()._cdata for parameter in captioner.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    rows, length = (
        torch.arange(images).repeat_interleave(5),
        20,
    )  # on the CPU: it says which image a caption is of
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.device("meta"),
    ):
        memory = captioner.encode(torch.empty(images, *CLIP_GRID))
        tokens = torch.zeros(len(rows), length, dtype=torch.long)
        caption_loss(captioner(memory, tokens, rows), tokens)
    activations = sum(storage.nbytes() for key, storage in kept.items() if key not in weights)
    image_side = 2 * 4 * (memory.keys.numel() + memory.values.numel())  # and its gradient
    scores = 2 * 4 * len(rows) * length * FULL_TABLE  # and their gradient
    boundaries = 4 * len(rows) * length * captioner.config.n_embd * captioner.config.n_layer
    learning = 12 * count(captioner, trainable=True)  # gradients and AdamW's two moments
    total = (
        4 * (303_179_776 + count(captioner))
        + learning
        + activations
        + image_side
        + scores
        + boundaries
    )
    assert 9e9 < total < 13e9, "all in fp32; room is left for the layer that is computed again"


# --- the library as reference


@pytest.mark.parametrize(
    "changes", [{}, {"tied_head": True}, {"reduction": 4}, {"image_positions": True}], ids=str
)
@torch.inference_mode()
def test_with_closed_gates_it_is_the_librarys_gpt2(changes: dict[str, Any]) -> None:
    captioner = plain(**changes)
    features, tokens = inputs()
    expected = library_model(captioner)(tokens).logits
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(
        captioner(captioner.encode(features), tokens, IMAGE), expected, atol=1e-5, rtol=1e-5
    )


@torch.inference_mode()
def test_open_it_is_the_librarys_gpt2_with_cross_attention() -> None:
    captioner = plain(gate=False)
    width, layers = captioner.config.n_embd, captioner.config.n_layer
    captioner.cross_keys_values = nn.Linear(
        width, 2 * layers * width
    )  # the library's image is as wide as its words
    model = library_model(captioner, add_cross_attention=True)
    parts = captioner.cross_keys_values.weight.unflatten(
        0, (2, layers, width)
    )  # (keys and values, layers, out, in)
    biases = captioner.cross_keys_values.bias.unflatten(0, (2, layers, width))
    for i, (block, cross) in enumerate(zip(model.transformer.h, captioner.cross, strict=True)):
        block.ln_cross_attn.load_state_dict(cross.norm.state_dict())
        attention = block.crossattention
        for theirs, ours in ((attention.q_attn, cross.query), (attention.c_proj, cross.out)):
            theirs.weight.copy_(ours.weight.T)
            theirs.bias.copy_(ours.bias)
        attention.c_attn.weight.copy_(torch.cat([parts[0, i], parts[1, i]]).T)
        attention.c_attn.bias.copy_(torch.cat([biases[0, i], biases[1, i]]))
    images, (_, tokens) = torch.randn(3, 9, width), inputs()
    expected = model(tokens, encoder_hidden_states=images[IMAGE]).logits
    blind = model(tokens, encoder_hidden_states=0 * images[IMAGE]).logits
    assert (expected - blind).abs().max() > 0.1, "the image matters"
    torch.testing.assert_close(
        captioner(captioner.encode(images), tokens, IMAGE), expected, atol=1e-5, rtol=1e-5
    )


@torch.inference_mode()
def test_greedy_search_is_the_librarys_generate() -> None:
    captioner = plain()
    model, memory = library_model(captioner), captioner.encode(inputs()[0][:1])
    lengths, end = set(), 14
    for start in range(12):
        found = decode(
            captioner, memory, 1, Specials(start, end), DecodingConfig(beam=1, max_length=12)
        )[0][0]
        prompt = torch.tensor([[start]])
        generated = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=end,
            pad_token_id=0,
        )[0, 1:].tolist()
        assert generated == [*found.tokens, *[end] * found.ended]
        lengths.add(len(generated))
    assert len(lengths) >= 3, "some captions end"


# --- what is frozen

FROZEN = (".wte.", ".wpe.", ".ln_1.", ".attn.", ".ln_f.")


@pytest.mark.parametrize("tied", [False, True])
def test_frozen_are_the_embeddings_the_self_attention_and_its_norms(tied: bool) -> None:
    captioner = tiny_model("clip_gpt2", tied_head=tied).train()
    features, tokens = inputs()
    caption_loss(captioner(captioner.encode(features), tokens, IMAGE), tokens).backward()
    for name, parameter in captioner.named_parameters():
        frozen = any(part in name for part in FROZEN)
        assert parameter.requires_grad is not frozen, name
        assert (parameter.grad is None) is frozen, name
    assert hasattr(captioner, "head") is not tied


def test_training_changes_what_learns_and_nothing_else(tmp_path: Path) -> None:
    data, encoder, tokenizer = tiny_data(tmp_path)
    captioner = ClipGpt2Captioner(
        tiny_config("clip_gpt2"), len(tokenizer), encoder.outputs["grid"], tokenizer.unk_id
    )
    before = {name: parameter.clone() for name, parameter in captioner.named_parameters()}
    config = TrainingConfig(
        epochs=2, batch_images=4, learning_rate=1e-2, weight_decay=0.1, average=0.9, dtype="fp32"
    )
    trainer = Trainer(
        captioner,
        tokenizer,
        data,
        encoder,
        config,
        DecodingConfig(beam=1, max_length=8),
        tmp_path / "run",
        "shapes",
        torch.float32,
        device=CPU,
    )
    trainer.train()
    for name, parameter in captioner.named_parameters():
        assert torch.equal(parameter, before[name]) is any(part in name for part in FROZEN), name
    assert load_bundle(tmp_path / "run" / "bundle").info["model"] == "clip_gpt2"


def test_the_untrained_head_scores_words_as_the_embedding_does() -> None:
    torch.manual_seed(0)
    captioner = ClipGpt2Captioner(tiny_config("clip_gpt2"), 16, (9, 12), 3)
    assert torch.equal(captioner.head.weight, captioner.gpt2.wte.weight)
    assert captioner.head.weight.data_ptr() != captioner.gpt2.wte.weight.data_ptr()


# --- options


def gradients(captioner: ClipGpt2Captioner, features: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(5)  # of dropout
    caption_loss(captioner(captioner.encode(features), tokens, IMAGE), tokens).backward()
    return {name: p.grad for name, p in captioner.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_keeps_fewer_activations_and_the_same_gradients(
    dropout: float,
) -> None:
    features, tokens = inputs()
    found, kept = [], []
    for twice in (False, True):
        captioner = tiny_model("clip_gpt2", dropout=dropout, gradient_checkpointing=twice).train()
        assert isinstance(captioner, ClipGpt2Captioner)
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            captioner(captioner.encode(features), tokens, IMAGE)
        kept.append(sum(sizes))
        found.append(gradients(captioner, features, tokens))
    assert kept[1] < kept[0] / 2
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-6, rtol=1e-5)


def test_options_cost_what_they_say() -> None:
    assert count(meta(replace(PUBLISHED, gate=True))) == count(meta(PUBLISHED)) + 24
    head = FULL_TABLE * 1024
    assert count(meta(replace(PUBLISHED, tied_head=True))) == count(meta(PUBLISHED)) - head
    reduced = meta(replace(PUBLISHED, reduction=4))
    assert (
        sum(m.weight.numel() for m in reduced.modules() if isinstance(m, nn.Linear)) - head
        == 100_663_296 // 4
    )
    small = meta(
        ClipGpt2Config(n_embd=384, n_layer=4, n_head=6, image_positions=True), 7100, (49, 1280)
    )
    assert small.image_position.shape == (49, 384) and small.image_projection.in_features == 1280


@torch.inference_mode()
def test_attention_is_returned_for_every_layer() -> None:
    captioner = tiny_model("clip_gpt2", reduction=2)
    state = captioner.start(captioner.encode(inputs()[0])).select(IMAGE)
    _, _, weights = captioner.step(torch.tensor([1, 1, 1, 1, 1]), state, attention=True)
    assert {name: tuple(w.shape) for name, w in weights.items()} == {
        "layer0": (5, 4, 9),
        "layer1": (5, 4, 9),
    }


@torch.inference_mode()
def test_under_autocast_stepping_still_follows_reading() -> None:
    captioner, (features, tokens) = tiny_model("clip_gpt2"), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        memory = captioner.encode(features)
        whole, state = captioner(memory, tokens, IMAGE), captioner.start(memory).select(IMAGE)
        for position in range(tokens.shape[1]):
            logits, state, _ = captioner.step(tokens[:, position], state)
            torch.testing.assert_close(
                logits.float(), whole[:, position].float(), atol=0.15, rtol=0.15
            )


@pytest.mark.parametrize(
    "changes", [{}, {"gate": False, "tied_head": True, "image_positions": True}], ids=str
)
def test_a_bundle_holds_the_whole_captioner(tmp_path: Path, changes: dict[str, Any]) -> None:
    captioner, encoder = tiny_model("clip_gpt2", **changes), tiny_encoder()
    info = bundle_info(
        "clip_gpt2", captioner, encoder, torch.float32, DecodingConfig(max_length=8), "shapes"
    )
    save_bundle(tmp_path / "bundle", Bundle(captioner, tiny_tokenizer(), info), dtype=torch.float32)
    loaded = load_bundle(tmp_path / "bundle").model
    assert asdict(loaded.config) == asdict(captioner.config)
    features, tokens = inputs()
    with torch.inference_mode():
        expected = captioner(captioner.encode(features), tokens, IMAGE)
        assert torch.equal(loaded(loaded.encode(features), tokens, IMAGE), expected)
    assert all(buffer.device == CPU for buffer in loaded.buffers())


@pytest.mark.parametrize("key", ["n_embd", "n_layer", "n_positions", "reduction"])
@pytest.mark.parametrize("value", [0, -1, 10**9])
def test_a_bundle_of_impossible_size_is_refused_before_it_is_built(
    tmp_path: Path, key: str, value: int
) -> None:
    captioner, encoder = tiny_model("clip_gpt2"), tiny_encoder()
    info = bundle_info(
        "clip_gpt2", captioner, encoder, torch.float32, DecodingConfig(max_length=8), "shapes"
    )
    info["architecture"][key] = value
    save_bundle(tmp_path / "bundle", Bundle(captioner, tiny_tokenizer(), info))
    with pytest.raises(CapGenError, match="impossible values"):
        load_bundle(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_head": 5}, "n_head"),
        ({"reduction": 3}, "reduction"),
        ({"reduction": 0}, "reduction"),
        ({"seq_len": 21}, "n_positions"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, Any], named: str) -> None:
    build: Callable[[], Any] = lambda: tiny_model("clip_gpt2", **change)  # noqa: E731
    with pytest.raises(CapGenError, match=named):
        build()
