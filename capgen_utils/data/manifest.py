"""One shape for every dataset: a list of images, each with its split and its captions."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from capgen_utils.common.files import CapGenError

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Item:
    """One image: its file relative to the manifest's root, its split and all of its captions."""

    image: str
    split: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """A dataset. An image belongs to one split with all its captions, so a split by caption row
    cannot be written.

    Attributes:
        name: what results call this data, such as ``flickr8k``.
        root: the folder that ``Item.image`` is relative to.
        items: one entry an image, sorted by split and file name; no image twice.
        report: what was left out on the way, and how often: reason -> count.
    """

    name: str
    root: Path
    items: tuple[Item, ...]
    report: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for item in self.items:
            if item.image in seen:
                raise CapGenError(
                    f"{self.name}: {item.image} is listed twice",
                    "give all captions of an image in one entry: an image belongs to exactly one split",
                )
            seen.add(item.image)

    def __len__(self) -> int:
        return len(self.items)

    def split(self, name: str) -> "Manifest":
        """Return the manifest of one split.

        Raises:
            CapGenError: no image belongs to it; lists the splits there are.
        """
        chosen = tuple(item for item in self.items if item.split == name)
        if not chosen:
            have = sorted({item.split for item in self.items})
            raise CapGenError(
                f"{self.name} has no split {name!r}", f"choose one of {', '.join(have)}"
            )
        return replace(self, items=chosen)

    def limit(self, count: int | None) -> "Manifest":
        """Return the first ``count`` images of every split (all of them for ``None``).

        Raises:
            CapGenError: ``count`` is below 1.
        """
        if count is None:
            return self
        if count < 1:
            raise CapGenError(f"{count} images of each split are not possible", "ask for 1 or more")
        kept = [item for split in self.split_names() for item in self.split(split).items[:count]]
        return replace(self, items=tuple(kept))

    def split_names(self) -> list[str]:
        """Return the splits that hold images, train, dev and test first."""
        have = {item.split for item in self.items}
        return [s for s in SPLITS if s in have] + sorted(have - set(SPLITS))

    def path(self, item: Item) -> Path:
        """Return the image file of ``item``."""
        return self.root / item.image

    def captions(self) -> Iterable[str]:
        """Yield every caption, image by image."""
        for item in self.items:
            yield from item.captions
