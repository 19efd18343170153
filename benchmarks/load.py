"""Load on a real ``capgen serve``: bounded clients that know which caption to expect.

Every client requests one caption after another and compares the answer with ``Captioner``'s. First
one client, then many, for the same time: the ratio is the gain of batching concurrent requests.
Then the process is killed under load without warning, started again, and has to answer as before.
"""

import argparse
import itertools
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

PHOTOS = REPOSITORY / "data" / "photos"
CLIENTS = 24
SECONDS = 60.0
PATIENCE = 300.0  # seconds for the service to start


class Server:
    """``capgen serve`` in a process of its own, on a free port.

    Args:
        bundle: a trained captioner; ``None`` for the one that ships.
        arguments: further arguments of the command.
    """

    def __init__(self, bundle: Path | None = None, arguments: Sequence[str] = ()) -> None:
        command = [sys.executable, "-m", "capgen_utils", "serve", "--port", "0"]
        command += ["--rate-limit", "none", *arguments]
        command += ["--bundle", str(bundle)] if bundle else []
        env = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        address = re.search(r"http://\S+", self.process.stdout.readline())
        if not address:
            raise RuntimeError("capgen serve did not start")
        self.address = address[0]
        end = time.monotonic() + PATIENCE
        while httpx.get(f"{self.address}/readyz", timeout=PATIENCE).status_code != 200:
            if time.monotonic() > end:
                raise RuntimeError("capgen serve did not become ready")
            time.sleep(0.05)

    def memory(self) -> tuple[int, int]:
        """Return resident and anonymous memory (without memory-mapped files) in bytes."""
        memory = psutil.Process(self.process.pid).memory_info()
        return memory.rss, memory.rss - getattr(memory, "shared", 0)

    def kill(self) -> None:
        """Kill the process without warning; a second call is harmless."""
        self.process.kill()
        self.process.wait()


@contextmanager
def serving(bundle: Path | None, arguments: Sequence[str] = ()) -> Iterator[Server]:
    """Yield a server that is ready."""
    server = Server(bundle, arguments)
    try:
        yield server
    finally:
        server.kill()


@dataclass
class Tally:
    """The answers to all clients.

    Attributes:
        latencies: seconds of each right answer.
        crossed: answers with a wrong caption, such as another image's.
        refused: answers 503, which are repeated a little later.
        lost: requests without an answer, or with an error.
    """

    latencies: list[float] = field(default_factory=list)
    crossed: int = 0
    refused: int = 0
    lost: int = 0


def expected_captions(bundle: Path | None, options: dict[str, str]) -> dict[str, str]:
    """Return the caption of each sample photograph by file name, made without the service."""
    from capgen_utils import Captioner

    captioner = Captioner.from_bundle(bundle)
    numbers: Any = {name: int(value) for name, value in options.items()}
    photos = sorted(PHOTOS.glob("*.jpg"))
    return {path.name: captioner.caption(path, **numbers)[0].text for path in photos}


def load(
    address: str,
    expected: dict[str, str],
    options: dict[str, str],
    clients: int,
    going: Callable[[], bool],
) -> Tally:
    """Run clients with one request at a time each until ``going`` returns false."""
    tally, lock = Tally(), threading.Lock()
    photographs = {name: (PHOTOS / name).read_bytes() for name in expected}

    def client(seed: int) -> None:
        draw = random.Random(seed)
        with httpx.Client(base_url=address, timeout=120) as connection:
            while going():
                name = draw.choice(sorted(photographs))
                started = time.perf_counter()
                try:
                    answer = connection.post(
                        "/v1/captions", files={"image": ("a.jpg", photographs[name])}, data=options
                    )
                except httpx.TransportError:
                    with lock:
                        tally.lost += 1
                    continue
                seconds = time.perf_counter() - started
                with lock:
                    judge(tally, answer, expected[name], seconds)
                if answer.status_code == 503:
                    time.sleep(draw.random() * float(answer.headers["retry-after"]))

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(clients)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return tally


def judge(tally: Tally, answer: httpx.Response, expected: str, seconds: float) -> None:
    """Count one answer."""
    if answer.status_code == 503:
        tally.refused += 1
    elif answer.status_code != 200:
        tally.lost += 1
    elif answer.json()["captions"][0]["caption"] != expected:
        tally.crossed += 1
    else:
        tally.latencies.append(seconds)


def for_seconds(seconds: float) -> Callable[[], bool]:
    """Return a function that is true for ``seconds``."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() < end


def for_requests(count: int, at_last: Callable[[], None] = lambda: None) -> Callable[[], bool]:
    """Return a function that is true ``count`` times in all threads; then it calls ``at_last``."""
    numbers = itertools.count()

    def going() -> bool:
        number = next(numbers)
        if number == count:
            at_last()
        return number < count

    return going


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that ``share`` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def figures(tally: Tally, seconds: float, clients: int) -> dict[str, Any]:
    """Return the figures of a load for the results file."""
    result: dict[str, Any] = {
        "clients": clients,
        "seconds": round(seconds, 1),
        "right": len(tally.latencies),
        "crossed": tally.crossed,
        "lost": tally.lost,
        "refused": tally.refused,
        "captions_per_second": round(len(tally.latencies) / seconds, 2),
    }
    for share in (0.5, 0.95, 0.99):
        name = f"p{share * 100:.0f}_milliseconds"
        result[name] = round(percentile(tally.latencies, share) * 1000) if tally.latencies else None
    return result


def timed(
    server: Server,
    expected: dict[str, str],
    options: dict[str, str],
    clients: int,
    going: Callable[[], bool],
) -> dict[str, Any]:
    """Load the service and return the figures, with its memory before and after."""
    before, started = server.memory(), time.perf_counter()
    tally = load(server.address, expected, options, clients, going)
    result = figures(tally, time.perf_counter() - started, clients)
    after = server.memory()
    for i, kind in enumerate(("resident", "anonymous")):
        result[f"{kind}_megabytes"] = [round(before[i] / 1e6), round(after[i] / 1e6)]
    return result


def killed_in_the_middle(
    bundle: Path | None,
    expected: dict[str, str],
    options: dict[str, str],
    requests: int,
    arguments: Sequence[str],
) -> dict[str, Any]:
    """Kill the service under load, start it again, and count right and wrong captions."""
    clients = 8
    with serving(bundle, arguments) as server:
        before = load(
            server.address, expected, options, clients, for_requests(requests, server.kill)
        )
    with serving(bundle, arguments) as again:
        after = load(again.address, expected, options, clients, for_requests(requests))
    return {
        "right_before": len(before.latencies),
        "cut_off": before.lost,
        "crossed": before.crossed + after.crossed,
        "right_after": len(after.latencies),
        "lost_after": after.lost,
    }


def bench_service(
    seconds: float = SECONDS,
    clients: int = CLIENTS,
    bundle: Path | None = None,
    arguments: Sequence[str] = (),
) -> dict[str, Any]:
    """Captions per second of the service: one client and many, greedy and default decoding."""
    result: dict[str, Any] = {"bundle": bundle.name if bundle else "the one that ships"}
    short = max(2.0, seconds / 4)
    for search, options in {"greedy": {"beam": "1"}, "default": {}}.items():
        expected = expected_captions(bundle, options)
        with serving(bundle, arguments) as server:
            # Memory settles first.
            load(server.address, expected, options, clients, for_seconds(short / 2))
            alone = timed(server, expected, options, 1, for_seconds(short))
            many = timed(server, expected, options, clients, for_seconds(seconds))
        ratio = many["captions_per_second"] / max(alone["captions_per_second"], 0.01)
        result[search] = {"one_client": alone, "many_clients": many, "ratio": round(ratio, 2)}
        result["photographs"] = len(expected)
    result["killed"] = killed_in_the_middle(bundle, expected, options, 80, arguments)
    return result


def main() -> int:
    """Run the benchmark alone and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--bundle", type=Path)
    options = parser.parse_args()
    print(json.dumps(bench_service(options.seconds, options.clients, options.bundle), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
