"""Shared by tests of metrics: captions and references that are in order."""

NOUNS = ["dog", "cat", "man", "woman", "boy", "girl"]
NOUNS += ["horse", "bird", "car", "boat", "ball", "tree"]


def proper(count: int = 24) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return captions and five references each that nothing is wrong with."""
    said = {
        f"{i}.jpg": f"a {NOUNS[i % 12]} beside the {NOUNS[(i * 5 + 1 + i // 12) % 12]}"
        for i in range(count)
    }
    return said, {
        name: [f"{caption} number {k}" for k in range(5)] for name, caption in said.items()
    }
