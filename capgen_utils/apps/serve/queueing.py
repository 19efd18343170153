"""A small queue before the model: what wants the same of it, at about the same time, runs together."""

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from capgen_utils.apps.serve.problems import Problem

Run = Callable[[Any, Sequence[Any]], Sequence[Any]]


@dataclass(frozen=True)
class Done:
    """What became of one item.

    Attributes:
        result: as the model returned it.
        waited: seconds in the queue.
        seconds: that the model took for the batch.
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
    """Runs items through a model in one thread of its own, items with equal keys together.

    An item leaves the queue when its future is cancelled. A batch begins when it is full, or when
    its oldest item has waited for ``window`` seconds; while the model works the queue fills by
    itself, so that under load no item waits for company. All methods belong to one event loop.

    Args:
        run: takes a key and items, returns for each a result or the exception that it caused;
            called in the thread.
        capacity: items that may wait.
        batch: items that run together at most.
        window: seconds.
        observe: gets the items and seconds of each batch.
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
        """Items that wait; what was cancelled does not."""
        self._jobs = [job for job in self._jobs if not job.future.done()]
        return len(self._jobs)

    def start(self) -> None:
        """Begin to work."""
        self._task = asyncio.get_running_loop().create_task(self._work())

    async def close(self) -> None:
        """Finish what was accepted, then end the thread."""
        self._closed = True
        self._arrived.set()
        if self._task is not None:
            await self._task
        self._pool.shutdown(wait=True)

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run anything else in the model's thread, after what runs there now."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def submit(self, key: Hashable, items: Sequence[Any]) -> list[Done]:
        """Queue ``items`` and wait for all of them; who is cancelled while waiting frees their
        places.

        Raises:
            Problem: 503, there is no room for all of them, or the service is ending.
            Exception: what ``run`` returned for one of them.
        """
        if self._closed:
            raise Problem.busy("the service is shutting down", "shutting_down")
        if self.waiting + len(items) > self.capacity:
            raise Problem.busy(f"{self.capacity} images wait already", seconds=2)
        loop = asyncio.get_running_loop()
        jobs = [_Job(key, item, loop.create_future()) for item in items]
        self._jobs += jobs
        self._arrived.set()
        return list(await asyncio.gather(*(job.future for job in jobs)))

    async def _work(self) -> None:
        while (jobs := await self._next()) is not None:
            if jobs:
                await self._run_together(jobs)

    async def _next(self) -> list[_Job] | None:
        """Return the next batch, ``None`` when all is done and the queue is closed."""
        while not self.waiting:
            if self._closed:
                return None
            await self._wait(None)
        head = self._jobs[0]
        while (left := head.since + self.window - time.monotonic()) > 0 and not self._closed:
            if self.waiting and len(self._like(self._jobs[0])) >= self.batch:
                break
            await self._wait(left)
        if not self.waiting:
            return []
        chosen = self._like(self._jobs[0])[: self.batch]
        self._jobs = [job for job in self._jobs if job not in chosen]
        return chosen

    def _like(self, head: _Job) -> list[_Job]:
        return [job for job in self._jobs if job.key == head.key]

    async def _wait(self, seconds: float | None) -> None:
        self._arrived.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._arrived.wait(), seconds)

    async def _run_together(self, jobs: Sequence[_Job]) -> None:
        started = time.monotonic()
        try:
            results = await self.call(self._run, jobs[0].key, [job.item for job in jobs])
        except Exception as error:  # a fault of ours must not stop the queue
            results = [error] * len(jobs)
        seconds = time.monotonic() - started
        done = []
        for job, result in zip(jobs, results, strict=True):
            done.append(Done(result, started - job.since, seconds, len(jobs)))
            if job.future.done():
                continue
            if isinstance(result, BaseException):
                job.future.set_exception(result)
            else:
                job.future.set_result(done[-1])
        self._observe(done)
