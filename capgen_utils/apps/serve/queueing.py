"""The queue of images before the model: those with equal options run together as a batch."""

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from capgen_utils.apps.serve.schemas import Problem

Run = Callable[[Any, Sequence[Any]], Sequence[Any]]


@dataclass(frozen=True)
class Done:
    """The result of one item, and how long it took.

    Attributes:
        result: what the model returned.
        waited: seconds in the queue.
        seconds: time of the model for the whole batch.
        batch: items that ran together.
    """

    result: Any
    waited: float
    seconds: float
    batch: int


@dataclass(eq=False)
class _Job:
    key: Hashable
    item: Any
    future: "asyncio.Future[Done]"
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Runs items through a model in its own thread, items with equal keys together.

    An item leaves the queue when its future is cancelled. A batch starts when it is full, or when
    its oldest item has waited for ``window`` seconds. While the model is busy the queue fills by
    itself, so that under load no item waits for others. All methods run on one event loop.

    Args:
        run: takes a key and items; returns a result or an exception for each. Called in the
            thread.
        capacity: items that may wait.
        batch: largest number of items that run together.
        window: seconds that an item waits for others.
        observe: receives the results of each batch.
    """

    def __init__(
        self,
        run: Run,
        capacity: int,
        batch: int,
        window: float,
        observe: Callable[[Sequence[Done]], None] = lambda done: None,
    ) -> None:
        self._run, self._observe = run, observe
        self.capacity, self.batch, self.window = capacity, batch, window
        self._jobs: list[_Job] = []
        self._arrived = asyncio.Event()
        self._pool = ThreadPoolExecutor(1, "capgen-model")
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def waiting(self) -> int:
        """Number of waiting items, without cancelled ones."""
        self._jobs = [job for job in self._jobs if not job.future.done()]
        return len(self._jobs)

    def start(self) -> None:
        """Start working."""
        self._task = asyncio.get_running_loop().create_task(self._work())

    async def close(self) -> None:
        """Finish all accepted items, then end the thread."""
        self._closed = True
        self._arrived.set()
        if self._task is not None:
            await self._task
        self._pool.shutdown(wait=True)

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run another function in the model's thread, after the current batch."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def submit(self, key: Hashable, items: Sequence[Any]) -> list[Done]:
        """Queue ``items`` and wait for all of them; cancelling the wait removes them again.

        Raises:
            Problem: 503, there is no room for all of them, or the service is shutting down.
            Exception: the one that ``run`` returned for an item.
        """
        if self._closed:
            raise Problem.busy("the service is shutting down", "shutting_down")
        if self.waiting + len(items) > self.capacity:
            raise Problem.busy(f"{self.capacity} images are waiting already", seconds=2)
        loop = asyncio.get_running_loop()
        jobs = [_Job(key, item, loop.create_future()) for item in items]
        self._jobs += jobs
        self._arrived.set()
        return list(await asyncio.gather(*(job.future for job in jobs)))

    async def _work(self) -> None:
        while self.waiting or not self._closed:
            if not self.waiting:
                await self._wait(None)
                continue
            head = self._jobs[0]
            batch = [job for job in self._jobs if job.key == head.key][: self.batch]
            left = head.since + self.window - time.monotonic()
            if left > 0 and len(batch) < self.batch and not self._closed:
                await self._wait(left)
                continue
            self._jobs = [job for job in self._jobs if job not in batch]
            await self._run_batch(batch)

    async def _wait(self, seconds: float | None) -> None:
        self._arrived.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._arrived.wait(), seconds)

    async def _run_batch(self, jobs: Sequence[_Job]) -> None:
        started = time.monotonic()
        try:
            results = await self.call(self._run, jobs[0].key, [job.item for job in jobs])
        except Exception as error:  # a bug of ours must not stop the queue
            results = [error] * len(jobs)
        seconds = time.monotonic() - started
        done = []
        for job, result in zip(jobs, results, strict=True):
            done.append(Done(result, started - job.since, seconds, len(jobs)))
            if job.future.done():  # cancelled
                continue
            if isinstance(result, BaseException):
                job.future.set_exception(result)
            else:
                job.future.set_result(done[-1])
        self._observe(done)
