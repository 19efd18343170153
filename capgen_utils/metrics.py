"""Scores of generated captions: corpus BLEU on one fixed tokenisation, and what BLEU hides."""

from collections.abc import Mapping, Sequence

from nltk.translate.bleu_score import corpus_bleu

from capgen_utils.files import CapGenError
from capgen_utils.text import tokenise

BLEU_PROTOCOL = (
    "corpus level, lower case, punctuation dropped, contractions split, references raw (no <unk>), "
    "end token not counted, no smoothing"
)
_WEIGHTS = [tuple(1 / n for _ in range(n)) for n in (1, 2, 3, 4)]


def bleu(hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return corpus BLEU-1 to BLEU-4, times 100 (Papineni et al. 2002), computed by nltk.

    Args:
        hypotheses: image -> generated caption.
        references: image -> its human captions, as they were written.

    Raises:
        CapGenError: the two name different images, or there is nothing to score.
    """
    if not hypotheses or set(hypotheses) != set(references):
        different = sorted(set(hypotheses) ^ set(references))[:3]
        raise CapGenError(
            f"{len(hypotheses)} captions and {len(references)} reference sets do not name the same images {different}",
            "score one caption for every image of the split",
        )
    names = sorted(hypotheses)
    spoken = [tokenise(hypotheses[name]) for name in names]
    human = [[tokenise(caption) for caption in references[name]] for name in names]
    if not any(spoken):
        return {f"BLEU-{n}": 0.0 for n in (1, 2, 3, 4)}
    scores = corpus_bleu(human, spoken, weights=_WEIGHTS, smoothing_function=_no_smoothing)
    return {f"BLEU-{n}": 100 * float(score) for n, score in zip((1, 2, 3, 4), scores, strict=True)}


def _no_smoothing(precisions: Sequence[object], *args: object, **kwargs: object) -> list[float]:
    """A corpus without one common 4-gram scores 0; nltk's default would warn and return 1e-231."""
    return [max(float(p), 1e-100) for p in precisions]  # type: ignore[arg-type]


def diversity(hypotheses: Mapping[str, str]) -> dict[str, float]:
    """Return how varied the captions are: distinct captions, words used, mean length in words, ``<unk>`` count."""
    words = [tokenise(caption) for caption in hypotheses.values()]
    return {
        "distinct": len({" ".join(w) for w in words}),
        "words_used": len({word for caption in words for word in caption}),
        "mean_length": sum(map(len, words)) / max(1, len(words)),
        "unk": sum(caption.count("<unk>") for caption in hypotheses.values()),
    }
