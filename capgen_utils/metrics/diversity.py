"""What scores hide: how varied captions are, and how much of them was copied from training."""

from collections.abc import Mapping

from capgen_utils.text import tokenise


def diversity(hypotheses: Mapping[str, str]) -> dict[str, float]:
    """Return how varied the captions are: distinct captions, words used, mean length in words, ``<unk>`` count."""
    words = [tokenise(caption) for caption in hypotheses.values()]
    return {
        "distinct": len({" ".join(w) for w in words}),
        "words_used": len({word for caption in words for word in caption}),
        "mean_length": sum(map(len, words)) / max(1, len(words)),
        "unk": sum(caption.count("<unk>") for caption in hypotheses.values()),
    }
