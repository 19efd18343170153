"""What the service accepts at most, and whom it answers: plain values, and the budget that several requests share."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from capgen_utils.service.problems import Problem


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and what the service holds at once.

    Attributes:
        body_bytes: of one request, counted while it arrives.
        images: of one request.
        pixels: of one image, read from its header before anything is decoded.
        frames: of an animation or a document of several pages; the first one is captioned.
        seconds: from the first byte of a request to its answer.
        requests: that are worked on at once; more are turned away before their body is read.
        upload_bytes: of all bodies that are held at once.
        pixel_bytes: of all decoded images that wait in full size.
        queue: images that wait for the model.
        batch: images that go through the model together.
        window: seconds that an image waits for company while the model has nothing to do.
    """

    body_bytes: int = 20_000_000
    images: int = 8
    pixels: int = 25_000_000
    frames: int = 1000
    seconds: float = 30.0
    requests: int = 128
    upload_bytes: int = 200_000_000
    pixel_bytes: int = 300_000_000
    queue: int = 64
    batch: int = 16
    window: float = 0.005


@dataclass(frozen=True)
class Protection:
    """Whom the service answers.

    Attributes:
        api_key: without it, captions, models and metrics are refused; ``None`` lets everybody in.
        cors: origins whose pages may call the service; none by default.
        rate: requests that one address may make, as ``limits`` writes it: ``300/minute``; ``None`` for no limit.
    """

    api_key: str | None = None
    cors: tuple[str, ...] = ()
    rate: str | None = "300/minute"


class Hold:
    """A share of a ``Budget``."""

    def __init__(self, budget: "Budget") -> None:
        self._budget, self.held = budget, 0

    def add(self, amount: int) -> None:
        """Take more.

        Raises:
            Problem: 503, there is not enough left.
        """
        if self._budget.used + amount > self._budget.total:
            raise Problem.busy(f"the service holds as many {self._budget.of} as it can")
        self._budget.used += amount
        self.held += amount


class Budget:
    """An amount that requests share. All of them run on one event loop, so no lock is needed.

    Args:
        total: what there is.
        of: its name, in the plural.
    """

    def __init__(self, total: int, of: str) -> None:
        self.total, self.of, self.used = total, of, 0

    @contextmanager
    def hold(self, amount: int = 0) -> Iterator[Hold]:
        """Yield a share that is given back at the end.

        Raises:
            Problem: 503, there is not enough left.
        """
        hold = Hold(self)
        try:
            hold.add(amount)
            yield hold
        finally:
            self.used -= hold.held
