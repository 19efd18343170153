"""The common form of all data sets: images with their split and captions (notebook 01)."""

from collections import Counter
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
    """A data set in which an image belongs to one split with all its captions.

    Attributes:
        name: used in results, such as ``flickr8k``.
        root: the folder that ``Item.image`` is relative to.
        items: one per image, sorted by split and file name; no image twice.
        report: what was left out when reading: reason -> count.
    """

    name: str
    root: Path
    items: tuple[Item, ...]
    report: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for image, count in Counter(item.image for item in self.items).items():
            if count > 1:
                raise CapGenError(
                    f"{self.name}: {image} is listed twice",
                    "give all captions of an image in one entry: it belongs to exactly one split",
                )

    def __len__(self) -> int:
        return len(self.items)

    def split(self, name: str) -> "Manifest":
        """Return the manifest of one split.

        Raises:
            CapGenError: no image belongs to it; names the splits that exist.
        """
        chosen = tuple(item for item in self.items if item.split == name)
        if not chosen:
            raise CapGenError(
                f"{self.name} has no split {name!r}",
                f"choose one of {', '.join(self.split_names())}",
            )
        return replace(self, items=chosen)

    def limit(self, count: int | None) -> "Manifest":
        """Return the first ``count`` images of each split; all of them for ``None``.

        Raises:
            CapGenError: ``count`` is below 1.
        """
        if count is None:
            return self
        if count < 1:
            raise CapGenError(f"a limit of {count} images is not possible", "ask for 1 or more")
        kept = [item for split in self.split_names() for item in self.split(split).items[:count]]
        return replace(self, items=tuple(kept))

    def split_names(self) -> list[str]:
        """Return the splits that hold images; train, dev and test come first."""
        names = {item.split for item in self.items}
        return [s for s in SPLITS if s in names] + sorted(names - set(SPLITS))

    def path(self, item: Item) -> Path:
        """Return the image file of ``item``."""
        return self.root / item.image

    def captions(self) -> Iterable[str]:
        """Yield every caption, image by image."""
        for item in self.items:
            yield from item.captions
