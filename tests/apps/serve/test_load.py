"""A short version of the load test of `make bench`: no lost or crossed answers, kill, restart."""

import json
from pathlib import Path

import httpx
import pytest
from helpers import ROOT, load_benchmark, save_tiny_bundle

bench = load_benchmark("load")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("load") / "tiny"
    save_tiny_bundle(folder)
    return folder


def test_under_load_every_client_gets_its_own_caption(bundle: Path) -> None:
    expected = bench.expected_captions(bundle, {"beam": "1"})
    assert len(set(expected.values())) >= 4, "captions tell the photographs apart"
    with bench.serving(bundle, ["--device", "cpu"]) as server:
        found = bench.timed(server, expected, {"beam": "1"}, 8, bench.for_requests(60))
        batches = httpx.get(f"{server.address}/metrics").text
    assert (found["crossed"], found["lost"]) == (0, 0) and found["right"] == 60
    count, images = (
        float(
            next(
                line.split()[1]
                for line in batches.splitlines()
                if line.startswith(f"capgen_batch_images_{what} ")
            )
        )
        for what in ("count", "sum")
    )
    assert images == found["right"] and images > count, "requests that met ran together"
    before, after = found["resident_megabytes"]
    assert after < before + 200
    assert found["p50_milliseconds"] <= found["p95_milliseconds"] <= found["p99_milliseconds"]


def test_killed_under_load_and_restarted(bundle: Path) -> None:
    expected = bench.expected_captions(bundle, {"beam": "1"})
    found = bench.killed_in_the_middle(bundle, expected, {"beam": "1"}, 24, ["--device", "cpu"])
    assert (found["crossed"], found["lost_after"]) == (0, 0)
    assert found["right_before"] >= 16 and found["right_before"] + found["cut_off"] == 24, (
        "8 were under way"
    )
    assert found["right_after"] == 24


def test_a_crossed_answer_is_noticed(bundle: Path) -> None:
    expected = bench.expected_captions(bundle, {"beam": "1"})
    tally = bench.Tally()
    answer = httpx.Response(200, json={"captions": [{"caption": "what another image shows"}]})
    bench.judge(tally, answer, next(iter(expected.values())), 0.1)
    bench.judge(tally, httpx.Response(500), "a", 0.1)
    bench.judge(tally, httpx.Response(503), "a", 0.1)
    assert (tally.crossed, tally.lost, tally.refused, tally.latencies) == (1, 1, 1, [])
    assert [bench.percentile(range(100), share) for share in (0, 0.5, 0.99, 1)] == [0, 50, 99, 99]


def test_the_published_run_lost_and_crossed_nothing_and_kept_to_its_goals() -> None:
    results = json.loads((ROOT / "results" / "benchmarks.json").read_text(encoding="utf-8"))
    if "service" not in results:
        pytest.skip("make bench has not measured the service yet")
    for search in ("greedy", "default"):
        for kind in ("one_client", "many_clients"):
            found = results["service"][search][kind]
            assert found["lost"] == found["crossed"] == 0 and found["right"] > 0
            before, after = found["resident_megabytes"]
            assert max(before, after) < 1500 and after - before < 100, "memory stays flat"
            assert (
                found["p50_milliseconds"] <= found["p95_milliseconds"] <= found["p99_milliseconds"]
            )
        assert results["service"][search]["ratio"] >= 2.5, "what requests gain that run together"
        assert results["service"][search]["many_clients"]["seconds"] >= 59
