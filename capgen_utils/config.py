"""Hyperparameters of captioners, CLIP, training and decoding: plain dataclasses, no torch.

Notebooks 03 to 08 explain them.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from capgen_utils.common.moved import moved_names

MINI = "gpt2-mini"  # the language model that is pre-trained here on the captions
SMALL_CLIP = "small_clip"  # the dual encoder that is trained here
LARGEST_BEAM = 100  # memory grows with the beam; captions stop changing long before this
LONGEST = 1024  # tokens in a caption


@dataclass(frozen=True)
class GridConfig:
    """Hyperparameters of all captioners that read the grid of a convolutional network.

    Attributes:
        img_size: side of the square the encoder sees, in pixels.
        cnn_backbone: name of the image encoder, a key of ``encoders.ENCODERS``.
        seq_len: longest caption in tokens, start and end token included.
    """

    img_size: int = 224
    cnn_backbone: str = "resnet50"
    seq_len: int = 40


@dataclass(frozen=True)
class TransformerConfig(GridConfig):
    """Hyperparameters of the ResNet + transformer captioner.

    Attributes:
        img_size, cnn_backbone, seq_len: see ``GridConfig``.
        d_model: width of the decoder.
        n_decode: number of decoder layers.
        n_head: attention heads in each layer; divides ``d_model``.
        fc_dim: width of the feed-forward layers.
        dropout: probability, on embeddings, attention outputs and feed-forward outputs alike.
        word_dropout: probability of replacing an input word by ``<unk>`` in training, so that the
            decoder learns to look at the image instead of completing the sentence from memory.
    """

    d_model: int = 256
    n_decode: int = 3
    n_head: int = 8
    fc_dim: int = 1024
    dropout: float = 0.2
    word_dropout: float = 0.0


@dataclass(frozen=True)
class ShowTellConfig(GridConfig):
    """Hyperparameters of the ResNet + LSTM captioner.

    Attributes:
        img_size, cnn_backbone, seq_len: see ``GridConfig``.
        image: ``sequence``: the LSTM reads the grid vector by vector before the words; ``pooled``:
            it reads one mean vector.
        embed_size: width of words and of projected image vectors.
        hidden_size: width of the LSTM.
        num_layers: LSTM layers.
        dropout: probability, on inputs, between layers and on outputs.
        word_dropout: see ``TransformerConfig``.
    """

    image: str = "sequence"
    embed_size: int = 512
    hidden_size: int = 512
    num_layers: int = 2
    dropout: float = 0.2
    word_dropout: float = 0.0


@dataclass(frozen=True)
class AttendTellConfig(GridConfig):
    """Hyperparameters of the ResNet + MLP attention + LSTM captioner.

    Attributes:
        img_size, cnn_backbone, seq_len: see ``GridConfig``.
        embed_size: width of words.
        hidden_size: width of the LSTM.
        attention_size: width of the attention MLP's hidden layer.
        dropout: probability, on words, contexts and outputs.
        word_dropout: see ``TransformerConfig``.
        doubly_stochastic: weight of the penalty on grid positions whose attention, summed over a
            caption, differs from 1.
        teacher_forcing: share of true previous words at the end of training; it falls linearly from
            1. The rest are sampled from the captioner (scheduled sampling, arXiv 1506.03099).
    """

    embed_size: int = 256
    hidden_size: int = 256
    attention_size: int = 256
    dropout: float = 0.3
    word_dropout: float = 0.0
    doubly_stochastic: float = 1.0
    teacher_forcing: float = 1.0


@dataclass(frozen=True)
class ClipPrefixConfig:
    """Hyperparameters of the CLIP prefix captioner: self-attention only, the image comes first.

    Attributes:
        seq_len: see ``GridConfig``.
        d_model, n_decode, n_head, fc_dim, dropout, word_dropout: see ``TransformerConfig``.
        noise: standard deviation of the noise added to the image vector, whose numbers are of about
            unit size, in training. A single vector identifies an image so well that a decoder can
            memorise each image's captions.
        text_inputs: ``learned``: an embedding table; ``tower``: the hidden states of CLIP's frozen
            text tower.
        tower_layers, tower_width, tower_heads, tower_positions: sizes of that tower.
    """

    seq_len: int = 40
    d_model: int = 512
    n_decode: int = 6
    n_head: int = 8
    fc_dim: int = 2048
    dropout: float = 0.1
    word_dropout: float = 0.0
    noise: float = 0.0
    text_inputs: str = "learned"
    tower_layers: int = 12
    tower_width: int = 512
    tower_heads: int = 8
    tower_positions: int = 77


@dataclass(frozen=True)
class ClipGpt2Config:
    """Hyperparameters of CLIP + GPT-2 with injected cross-attention; the defaults are GPT-2 medium.

    Attributes:
        seq_len: longest caption in tokens, start and end token included.
        language_model: whose weights it starts from: ``gpt2-mini`` (pre-trained here), a name on
            the hub such as ``gpt2-medium``, or a local folder in the hub's layout.
        n_embd, n_layer, n_head, n_positions: GPT-2's own sizes.
        dropout: probability, on embeddings, image vectors, attention outputs and MLP outputs alike.
        word_dropout: see ``TransformerConfig``.
        image_positions: project the image vectors to ``n_embd``, normalise them and add learned
            positions, for encoders whose vectors hold no positions; CLIP's do.
        gate: multiply each cross-attention by a learned tanh gate that starts at zero, so that the
            untrained captioner is plain GPT-2 (arXiv 2204.14198).
        tied_head: score words with the frozen token embedding instead of a separate head.
        reduction: the width of the cross-attention is ``n_embd / reduction``.
        gradient_checkpointing: recompute activations in training instead of storing them: slower,
            with much less memory.
    """

    seq_len: int = 40
    language_model: str = "gpt2-medium"
    n_embd: int = 1024
    n_layer: int = 24
    n_head: int = 16
    n_positions: int = 1024
    dropout: float = 0.1
    word_dropout: float = 0.0
    image_positions: bool = False
    gate: bool = True
    tied_head: bool = False
    reduction: int = 1
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class SmallClipConfig:
    """Sizes of a small CLIP that is trained here; the code of both halves is the library's.

    Attributes:
        embed_size: width of the joint embedding of images and texts.
        patch: side of the squares that the stem's grid is split into; each becomes one token.
        vision_width, vision_layers, vision_heads: of the image half's transformer.
        text_width, text_layers, text_heads: of the text half's causal transformer.
        seq_len: longest text in tokens, start and end token included.
    """

    embed_size: int = 512
    patch: int = 1
    vision_width: int = 384
    vision_layers: int = 2
    vision_heads: int = 6
    text_width: int = 384
    text_layers: int = 3
    text_heads: int = 6
    seq_len: int = 40


@dataclass(frozen=True)
class TrainingConfig:
    """How a captioner is trained.

    Attributes:
        epochs: passes over the training images; training can end earlier, see ``patience``.
        batch_images: images per batch, over all processes; each comes with all of its captions.
        learning_rate: peak of AdamW's learning rate, after ``warmup``; it falls along a cosine.
        warmup: share of all steps spent warming up.
        weight_decay: AdamW's, on matrices only.
        label_smoothing: share of the target probability spread over the vocabulary.
        clip: largest gradient norm.
        average: decay of the exponential moving average of the weights that is evaluated and kept;
            0 to use the weights themselves.
        best_by: criterion for the best epoch on the dev split: ``BLEU-4`` of generated captions, or
            ``dev_loss``.
        patience: training stops after this many epochs without improvement.
        evaluate_every: epochs between two evaluations.
        dev_images: images of the dev split that are captioned per evaluation; ``None`` for all.
        checkpoint_steps: steps between two checkpoints within an epoch; each epoch ends with one.
        seed: of weights, batches and dropout.
        dtype: compute dtype of training: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
    """

    epochs: int = 20
    batch_images: int = 64
    learning_rate: float = 5e-4
    warmup: float = 0.05
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    clip: float = 1.0
    average: float = 0.0
    best_by: str = "BLEU-4"
    patience: int = 5
    evaluate_every: int = 1
    dev_images: int | None = None
    checkpoint_steps: int = 500
    seed: int = 1
    dtype: str = "auto"


@dataclass(frozen=True)
class ContrastiveConfig(TrainingConfig):
    """How a small CLIP is trained; ``patience`` counts epochs without a better dev score.

    Attributes:
        captions: captions per image in a batch, chosen anew in every epoch.
        twins: false twins per caption in a batch, if it has that many.
        twin_weight: weight of the loss that compares captions only with their twins.
        reconstruction: weight of the loss of reconstructing the stem's grid from an image's vector;
            0 to omit it.
        looking: initial epochs in which the image half learns from that loss alone.
        captioning: weight of the loss of generating an image's captions from its vector; 0 to omit
            it.
        temperature: initial temperature of the softmax; it is learned.
        feature_dropout: probability of zeroing a number of the stem's grid.
        word_dropout: probability of dropping a token of a caption.
    """

    captions: int = 2
    twins: int = 1
    twin_weight: float = 1.0
    reconstruction: float = 0.0
    looking: int = 0
    captioning: float = 0.0
    temperature: float = 0.07
    feature_dropout: float = 0.0
    word_dropout: float = 0.0


class Option(NamedTuple):
    """What the command line, the service and the bounds check know of one field of a configuration.

    Attributes:
        low, high: the smallest and the largest possible value, both included.
        help: one line for ``--help`` and the API schema.
        metavar: how ``--help`` writes the value.
    """

    low: float
    high: float
    help: str
    metavar: str = "N"


def _option(default: Any, *option: Any) -> Any:
    return field(default=default, metadata={"option": Option(*option)})


@dataclass(frozen=True)
class DecodingConfig:
    """How captions are searched for or sampled; see ``decoding.search.decode``.

    Each field carries its bounds and its help text. The command line, the service's request schema
    and the bounds check are built from them.

    Attributes:
        beam: hypotheses kept per image; 1 is greedy search. Ignored when sampling.
        max_length: longest caption in tokens, including the end token.
        length_penalty: a hypothesis of n tokens, including the end token, is ranked by
            log-probability / n ** length_penalty.
        min_length: shortest caption in tokens, not counting the end token.
        temperature: divides the logits before sampling; 0 means greedy or beam search.
        temperatures: sample one caption at each of these, 0 being the most likely one, instead of
            using ``beam``, ``temperature`` and ``samples``; empty for none.
        top_k: sample from the k most likely tokens; 0 for all.
        top_p: sample from the smallest set of tokens with this total probability; 1 for all.
        repetition_penalty: above 1, makes tokens that the caption already contains less likely.
        no_repeat_ngram: never repeat an n-gram of this length; 0 for no limit.
        groups: diverse beam search: split the beam into this many groups that avoid each other.
        diversity: subtracted from a token's log-probability for each hypothesis of an earlier group
            that chose it at the same step; unused with a single group.
        samples: captions sampled per image.
        seed: seed for sampling.
    """

    beam: int = _option(5, 1, LARGEST_BEAM, "hypotheses kept per image; 1 is greedy search")
    max_length: int = _option(39, 1, LONGEST, "longest caption in tokens")
    length_penalty: float = _option(
        1.0, -10, 10, "above 0, beam search favours longer captions", "X"
    )
    min_length: int = _option(0, 0, LONGEST, "shortest caption in tokens")
    temperature: float = _option(
        0.0, 0, 100, "above 0, sample captions: low is safe, high is varied", "X"
    )
    temperatures: tuple[float, ...] = _option(
        (), 0, 100, "with re-ranking: sample one candidate at each of these temperatures", "X"
    )
    top_k: int = _option(
        0, 0, 10**9, "sample from the N most likely tokens (implies temperature 1)"
    )
    top_p: float = _option(
        1.0,
        0.001,
        1,
        "sample from the smallest set of tokens with this total probability "
        "(implies temperature 1)",
        "X",
    )
    repetition_penalty: float = _option(
        1.0, 0.01, 100, "above 1, avoid tokens that the caption already contains", "X"
    )
    no_repeat_ngram: int = _option(0, 0, LONGEST, "never repeat an n-gram of this length")
    groups: int = _option(
        1, 1, LARGEST_BEAM, "diverse beam search: groups that split the beam and avoid each other"
    )
    diversity: float = _option(0.5, 0, 1000, "how strongly the groups avoid each other", "X")
    samples: int = _option(1, 1, LARGEST_BEAM, "captions sampled per image")
    seed: int = _option(0, 0, 2**63 - 1, "seed for sampling")

    def to_json(self) -> dict[str, Any]:
        """Return the values as bundles and results files store them: no empty ``temperatures``."""
        return {name: value for name, value in asdict(self).items() if value != ()}


@dataclass(frozen=True)
class Recipe:
    """How one captioner is trained.

    Attributes:
        config: its hyperparameters.
        encoder: a key of ``encoders.ENCODERS``, or ``SMALL_CLIP``; ``None`` for the preset's.
        tokenizer: ``word``, ``clip`` or ``gpt2``.
        training, decoding: ``None`` for the preset's.
    """

    config: Any
    encoder: str | None = None
    tokenizer: str = "word"
    training: TrainingConfig | None = None
    decoding: DecodingConfig | None = None


# The captioners on public encoders in their usual sizes, for presets without recipes of their own.
RECIPES: dict[str, Recipe] = {
    "show_tell": Recipe(ShowTellConfig()),
    "attend_tell": Recipe(AttendTellConfig(embed_size=512, hidden_size=512, attention_size=512)),
    "transformer": Recipe(TransformerConfig()),
    "clip_prefix": Recipe(ClipPrefixConfig(), "clip-vit-base-patch32", "clip"),
    "clip_gpt2": Recipe(
        ClipGpt2Config(gradient_checkpointing=True),
        "clip-vit-large-patch14",
        "gpt2",
        training=TrainingConfig(batch_images=16, learning_rate=1e-4),  # fits a GPU of 16 GB
    ),
}


__getattr__ = moved_names(__name__)  # for notebooks of earlier copies
