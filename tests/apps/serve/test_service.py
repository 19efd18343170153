"""The service: correct captions, batches, limits, API key, and never a traceback."""

import asyncio
import contextlib
import io
import json
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers import PHOTOS, capgen, save_tiny_bundle, tiny_dual, tiny_tokenizer
from hostile import corpus, good_files, saved, scene
from PIL import Image
from serving_helpers import ServeProcess, running, until

from capgen_utils.apps.cli.main import main
from capgen_utils.apps.serve.app import create_app
from capgen_utils.apps.serve.protection import Budget, Limits, Protection, client_key, parse_rate
from capgen_utils.apps.serve.queueing import Batcher
from capgen_utils.apps.serve.schemas import Options, Problem
from capgen_utils.apps.serve.served import Served, region
from capgen_utils.apps.serve.uploads import open_upload, scans_exceed
from capgen_utils.bundle import load_bundle, save_bundle
from capgen_utils.captioner import Captioner
from capgen_utils.common.files import CapGenError
from capgen_utils.data.images import MAX_PIXELS

NAMES = sorted(path.name for path in PHOTOS.glob("*.jpg"))[:4]
Pair = tuple[httpx.Client, Any]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that can do everything: attention, and a CLIP of its own."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    save_tiny_bundle(folder)
    read = load_bundle(folder)
    encoder = read.build_encoder()
    save_bundle(folder, read, encoder, scorer=tiny_dual(encoder, tiny_tokenizer()))
    return folder


@pytest.fixture(scope="module")
def served(bundle: Path) -> Served:
    return Served.load("tiny", bundle, device="cpu")


@pytest.fixture(scope="module")
def captioner(bundle: Path) -> Captioner:
    return Captioner.from_bundle(bundle, device="cpu")


@pytest.fixture(scope="module")
def service(served: Served) -> Iterator[Pair]:
    with running(served) as pair:
        yield pair


def images(*names: str) -> list[tuple[str, tuple[str, bytes]]]:
    return [("image", (name, (PHOTOS / name).read_bytes())) for name in names]


def one(data: bytes | None = None) -> list[tuple[str, tuple[str, bytes]]]:
    return [("image", ("a.png", data or saved("PNG")))]


def ask(client: httpx.Client, data: bytes | None = None, **options: Any) -> httpx.Response:
    return client.post(
        "/v1/captions", files=one(data), data={k: str(v) for k, v in options.items()}
    )


def check_problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    found: dict[str, Any] = answer.json()
    assert (answer.status_code, found["code"]) == (status, code), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert (
        found["status"] == status
        and found["title"]
        and found["detail"]
        and found["type"] == "about:blank"
    )
    assert "Traceback" not in answer.text and ".py" not in answer.text
    return found


class Held:
    """Makes the model wait for ``go``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, served: Served) -> None:
        self.go, self.batches, real = threading.Event(), list[int](), served.run

        def run(options: Options, items: Any) -> Any:
            self.batches.append(len(items))
            assert self.go.wait(100)
            return real(options, items)

        monkeypatch.setattr(served, "run", run)


# --- captions


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beam": 1},
        {"beam": 4, "length_penalty": 0.5},
        {"candidates": 3, "beam": 1, "min_length": 2},
        {"temperature": 1.5, "top_p": 0.8, "candidates": 7, "seed": 3},
        {"top_k": 5, "candidates": 2, "no_repeat_ngram": 2},
        {"groups": 2, "beam": 4, "diversity": 0.5},
        {"rerank": True},
        {"rerank": True, "temperatures": [0.0, 0.7, 1.3]},
    ],
    ids=str,
)
def test_captions_are_those_of_the_captioner(
    service: Pair, captioner: Captioner, options: dict[str, Any]
) -> None:
    data = {k: [str(x) for x in v] if isinstance(v, list) else str(v) for k, v in options.items()}
    answer = service[0].post("/v1/captions", files=images(*NAMES), data=data)
    assert answer.status_code == 200, answer.text
    expected = captioner.caption([PHOTOS / name for name in NAMES], **options)
    for place, (found, own) in enumerate(zip(answer.json()["captions"], expected, strict=True)):
        assert (found["image"], found["caption"], found["ended"]) == (place, own.text, own.ended)
        assert [c["text"] for c in found["candidates"]] == [c.text for c in own.candidates]
        for shown, exact in zip(found["candidates"], own.candidates, strict=True):
            assert shown["log_probability"] == pytest.approx(exact.log_probability, abs=2e-4)
            assert (shown["clip_score"] is None) == (exact.clip_score is None)
        assert found["attention"] is None


def test_the_command_line_says_the_same(
    service: Pair, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            ["caption", "--bundle", str(bundle), "--json", *[str(PHOTOS / name) for name in NAMES]]
        )
        == 0
    )
    rows = [json.loads(line)["caption"] for line in capsys.readouterr().out.splitlines()]
    answer = service[0].post("/v1/captions", files=images(*NAMES)).json()
    assert [found["caption"] for found in answer["captions"]] == rows and answer["model"] == "tiny"
    assert set(answer["timing"]) == {"total_ms", "read_ms", "queue_ms", "model_ms", "batch"}


def test_every_kind_of_image_is_captioned_as_from_a_file(
    service: Pair, captioner: Captioner, tmp_path: Path
) -> None:
    for kind, data in good_files().items():
        (tmp_path / "image").write_bytes(data)
        found = ask(service[0], data).json()["captions"][0]
        assert found["caption"] == captioner.caption(tmp_path / "image")[0].text, kind


def test_a_turned_photograph_is_captioned_upright(service: Pair) -> None:
    upright = scene(size=(48, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees to see it so
    turned = saved("PNG", upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    found, expected = (
        ask(service[0], data).json()["captions"][0] for data in (turned, saved("PNG", upright))
    )
    assert (found["width"], found["height"]) == (48, 40) and found == expected
    assert not open_upload(turned, 0, Limits()).info, "what else the camera noted is gone"


def test_attention_comes_with_its_region_of_the_photograph(
    service: Pair, captioner: Captioner
) -> None:
    found = (
        service[0]
        .post("/v1/captions", files=images(NAMES[0]), data={"attention": "true"})
        .json()["captions"][0]
    )
    maps = found["attention"]
    assert " ".join(word["text"] for word in maps["words"]) == found["caption"]
    assert all(sum(word["weights"]) == pytest.approx(1, abs=0.01) for word in maps["words"])
    assert all(len(word["weights"]) == maps["rows"] * maps["columns"] for word in maps["words"])
    assert maps["region"] == {"left": 0, "top": 0, "width": 1, "height": 1}
    looked = captioner.attention(PHOTOS / NAMES[0])[1]
    mean = sum(weights.mean(1) for weights in looked.values()) / len(looked)
    assert maps["words"][1]["weights"] == pytest.approx(mean[1].tolist(), abs=1e-4)
    assert ask(service[0], attention=True, min_length=0, max_length=1).status_code == 200


def test_the_region_of_a_cropping_encoder_is_the_middle(captioner: Captioner) -> None:
    from dataclasses import replace

    crop = replace(captioner.encoder.preprocessing, resize="crop")
    found = region((400, 100), crop)
    assert (found.left, found.top, found.width, found.height) == (0.375, 0, 0.25, 1)


def test_several_captioners_are_chosen_by_name(served: Served, tmp_path: Path) -> None:
    save_tiny_bundle(tmp_path / "other", d_model=16, n_head=2)
    other = Served.load("other", tmp_path / "other", device="cpu")
    with running(served, other) as (client, _):
        listed = client.get("/v1/models").json()
        assert [(m["name"], m["default"], m["rerank"]) for m in listed["models"]] == [
            ("tiny", True, True),
            ("other", False, False),
        ]
        assert listed["limits"]["images"] == Limits().images
        answer = client.post("/v1/captions", files=images(NAMES[0]), data={"model": "other"}).json()
        expected = other.captioner.caption(PHOTOS / NAMES[0])[0].text
        assert (answer["model"], answer["captions"][0]["caption"]) == ("other", expected)
        assert (
            "tiny, other"
            in check_problem(ask(client, model="third"), 422, "unknown_model")["remedy"]
        )
        check_problem(ask(client, model="other", rerank=True), 422, "impossible_options")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beam", 0),
        ("beam", 17),
        ("candidates", 33),
        ("temperature", "nan"),
        ("temperature", -1),
        ("top_p", 0),
        ("top_k", -1),
        ("seed", -1),
        ("max_length", 201),
        ("length_penalty", "inf"),
        ("repetition_penalty", 0),
        ("no_repeat_ngram", -1),
        ("groups", 0),
        ("diversity", -1),
        ("rerank", "perhaps"),
        ("bogus", 1),
    ],
)
def test_every_option_has_bounds(service: Pair, field: str, value: Any) -> None:
    found = check_problem(ask(service[0], **{field: value}), 422, "bad_options")
    assert [error["field"] for error in found["errors"]] == [field]
    assert field not in Options.model_fields or field in str(service[0].get("/openapi.json").json())


@pytest.mark.parametrize(
    "options",
    [
        {"beam": 3, "top_p": 0.5},
        {"max_length": 200},
        {"diversity": 1},
        {"temperatures": 1},
        {"min_length": 20},
    ],
)
def test_options_that_contradict_each_other_say_what_to_do(
    service: Pair, options: dict[str, Any]
) -> None:
    assert check_problem(ask(service[0], **options), 422, "impossible_options")["remedy"]


def test_empty_fields_are_ignored_and_every_option_is_declared(service: Pair) -> None:
    assert ask(service[0], beam="", model=" ").status_code == 200
    document = service[0].get("/openapi.json").json()
    content = document["paths"]["/v1/captions"]["post"]["requestBody"]["content"][
        "multipart/form-data"
    ]
    assert set(content["schema"]["properties"]) == {"image", *Options.model_fields}
    assert content["schema"]["properties"]["beam"] == {
        "description": "hypotheses kept per image; 1 is greedy search",
        "maximum": 16,
        "minimum": 1,
        "title": "Beam",
        "type": "integer",
    }
    assert len(content["examples"]) >= 3
    responses = document["paths"]["/v1/captions"]["post"]["responses"]
    assert {"200", "400", "408", "413", "415", "422", "429", "503", "504"} <= set(responses)
    assert service[0].get("/docs").status_code == 404, "its page would load scripts from elsewhere"


# --- batches


def test_requests_with_equal_options_share_a_batch(
    served: Served, captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(served, limits=Limits(batch=4)) as (client, app), ThreadPoolExecutor(12) as pool:
        held = Held(monkeypatch, served)
        first = pool.submit(ask, client)
        until(lambda: held.batches, "the first batch")
        same = [pool.submit(client.post, "/v1/captions", files=images(name)) for name in NAMES]
        other = [pool.submit(ask, client, beam=1) for _ in range(2)]
        until(lambda: app.state.service.batcher.waiting == 6, "six in the queue")
        held.go.set()
        assert first.result().status_code == 200
        expected = [
            caption.text for caption in captioner.caption([PHOTOS / name for name in NAMES])
        ]
        assert [f.result().json()["captions"][0]["caption"] for f in same] == expected
        assert {f.result().json()["timing"]["batch"] for f in same} == {4}
        assert {f.result().json()["timing"]["batch"] for f in other} == {2}
        assert sorted(held.batches) == [1, 2, 4]


def test_a_full_queue_says_when_to_come_back(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        running(served, limits=Limits(queue=2, images=2)) as (client, app),
        ThreadPoolExecutor(3) as pool,
    ):
        held = Held(monkeypatch, served)
        running_now = pool.submit(ask, client)
        until(lambda: held.batches, "the first batch")
        waiting = pool.submit(client.post, "/v1/captions", files=one() + one())
        until(lambda: app.state.service.batcher.waiting == 2, "a full queue")
        answer = ask(client)
        check_problem(answer, 503, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
        held.go.set()
        assert running_now.result().status_code == waiting.result().status_code == 200
        assert ask(client).status_code == 200


def test_a_client_that_disconnects_leaves_the_queue(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        running(served, limits=Limits(queue=1, images=1)) as (client, app),
        ThreadPoolExecutor(2) as pool,
    ):
        held, batcher = Held(monkeypatch, served), app.state.service.batcher
        now = pool.submit(ask, client)
        until(lambda: held.batches, "the first batch")
        request = client.build_request("POST", "/v1/captions", files=one())
        with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as leaver:
            head = "".join(f"{k}: {v}\r\n" for k, v in request.headers.items())
            leaver.sendall(f"POST /v1/captions HTTP/1.1\r\n{head}\r\n".encode() + request.read())
            until(lambda: batcher.waiting == 1, "the second image in the queue")
            check_problem(ask(client), 503, "queue_full")
        until(lambda: batcher.waiting == 0, "the place of the client that left")
        then = pool.submit(ask, client)
        until(lambda: batcher.waiting == 1, "another client in its place")
        held.go.set()
        assert now.result().status_code == then.result().status_code == 200
        assert held.batches == [1, 1], "nobody captioned the image of the client that left"
        assert "capgen_clients_left_total 1.0" in client.get("/metrics").text


def test_a_request_has_a_deadline(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(served, limits=Limits(seconds=0.3)) as (client, app):
        held = Held(monkeypatch, served)
        check_problem(ask(client), 504, "deadline")
        held.go.set()
        until(lambda: app.state.service.batcher.waiting == 0, "an empty queue")
        request = client.build_request("POST", "/v1/captions", files=one())
        with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as slow:
            head = "".join(f"{k}: {v}\r\n" for k, v in request.headers.items())
            slow.sendall(f"POST /v1/captions HTTP/1.1\r\n{head}\r\n".encode() + request.read()[:50])
            assert b" 408 " in slow.recv(10_000)


def test_the_queue_survives_failures_and_finishes_accepted_items() -> None:
    def run(key: str, items: list[Any]) -> list[Any]:
        if key == "bad":
            raise ValueError("a fault")
        return [ZeroDivisionError() if item == 0 else 10 / item for item in items]

    async def work() -> None:
        batcher = Batcher(run, capacity=8, batch=4, window=0.001)
        batcher.start()
        with pytest.raises(ValueError, match="a fault"):
            await batcher.submit("bad", [1])
        both = await asyncio.gather(
            batcher.submit("a", [1, 2]),
            batcher.submit("a", [0]),
            batcher.submit("b", [5]),
            return_exceptions=True,
        )
        assert [done.result for done in both[0]] == [10, 5] and isinstance(
            both[1], ZeroDivisionError
        )  # type: ignore[union-attr]
        last = asyncio.create_task(batcher.submit("a", [2, 4]))
        await asyncio.sleep(0)
        await batcher.close()
        assert [done.result for done in await last] == [5, 2.5]
        with pytest.raises(Problem):
            await batcher.submit("a", [1])

    asyncio.run(work())


def test_one_bad_item_of_a_batch_harms_no_other(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [served.prepare(scene(), Options()) for _ in range(3)]
    real = served._run

    def run(options: Options, some: Any) -> Any:
        if any(item is items[1] for item in some):
            raise RuntimeError("this one")
        return real(options, some)

    monkeypatch.setattr(served, "_run", run)
    found = served.run(Options(), items)
    assert [isinstance(each, RuntimeError) for each in found] == [False, True, False]


def test_not_ready_before_the_first_caption(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served, go = Served.load("cold", bundle, device="cpu"), threading.Event()
    real = served.warm_up
    monkeypatch.setattr(served, "warm_up", lambda: (go.wait(100), real()))
    from fastapi.testclient import TestClient

    with TestClient(create_app([served])) as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        assert int(client.get("/readyz").headers["retry-after"]) >= 1
        for answer in (client.get("/readyz"), client.post("/v1/captions", files=one())):
            assert answer.status_code == 503 and answer.json()["code"] == "not_ready"
        go.set()
        until(lambda: client.get("/readyz").status_code == 200, "the warm start")
        assert client.post("/v1/captions", files=one()).status_code == 200


# --- bounds


def test_bytes_are_counted_while_they_arrive(served: Served) -> None:
    with running(served, limits=Limits(body_bytes=100_000)) as (client, _):
        check_problem(ask(client, saved("PNG") + bytes(200_000)), 413, "body_too_large")
        sent = 0

        def endless() -> Iterator[bytes]:
            nonlocal sent
            yield b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\n'
            while sent < 500_000_000:
                sent += 50_000
                yield bytes(50_000)

        with contextlib.suppress(httpx.TransportError):  # it hangs up while we still write
            answer = client.post(
                "/v1/captions",
                content=endless(),
                headers={"content-type": "multipart/form-data; boundary=b"},
            )
            check_problem(answer, 413, "body_too_large")
        assert sent < 200_000_000, (
            "it reads a little more, so that honest clients hear why, and then hangs up"
        )
        assert ask(client).status_code == 200


def test_images_pixels_and_frames_are_counted(served: Served) -> None:
    with running(served, limits=Limits(images=2, pixels=10_000, frames=3)) as (client, _):
        post = client.post
        check_problem(post("/v1/captions", files=one() * 3), 413, "too_many_images")
        check_problem(
            ask(client, saved("PNG", Image.new("RGB", (101, 100)))), 413, "image_too_large"
        )
        assert ask(client, saved("PNG", Image.new("RGB", (100, 100)))).status_code == 200
        for kind in ("GIF", "PNG", "WEBP", "TIFF"):
            pages = [Image.new("RGB", (9, 9), (60 * i, 0, 0)) for i in range(4)]
            three, four = (
                saved(kind, pages[0], save_all=True, append_images=pages[1:n]) for n in (3, 4)
            )
            assert ask(client, three).status_code == 200, kind
            found = check_problem(ask(client, four), 413, "image_too_large")
            assert found["errors"][0]["image"] == 0, kind
        bad = check_problem(post("/v1/captions", files=one() + one(b"no image")), 422, "bad_image")
        assert bad["errors"][0]["image"] == 1
    assert Limits().pixels <= MAX_PIXELS


def test_a_budget_is_given_back() -> None:
    budget = Budget(10, "bytes")
    with budget.hold(4) as take:
        take(6)
        with pytest.raises(Problem), budget.hold(1):
            pass
    assert budget.used == 0


def test_scans_of_a_jpeg_are_counted_by_its_structure() -> None:
    data = saved("JPEG", progressive=True)
    count = next(n for n in range(100) if not scans_exceed(data, n))
    assert 3 <= count <= 12 and not scans_exceed(saved("JPEG"), 1)
    comment = b"\xff\xfe\x0f\xf2" + b"\xff\xda" * 2040
    assert not scans_exceed(data[:2] + comment + data[2:] + b"\xff\xda\0\2" * 500, count), (
        "none within segments or behind"
    )


def test_nothing_of_an_upload_is_written_or_logged(
    service: Pair, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    written: list[str] = []
    listening = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if listening and event == "open" and isinstance(arguments[2], int) and arguments[2] & 0o3:
            written.append(str(arguments[0]))

    sys.addaudithook(hook)
    caplog.set_level(logging.DEBUG)
    logging.getLogger("httpcore").setLevel(logging.WARNING)
    secret = "secret-photograph-of-grandma"
    big = io.BytesIO()
    Image.effect_noise((1200, 1200), 90).convert("RGB").save(
        big, "JPEG", quality=95, comment=secret.encode()
    )
    assert len(big.getvalue()) > 1_100_000, "large enough to be spooled to disk by those who do"
    files = [
        ("image", (f"{secret}.jpg", big.getvalue())),
        ("image", (f"{secret}.jpg", big.getvalue())),
    ]
    try:
        assert service[0].post("/v1/captions", files=files).status_code == 200
        answer = service[0].post(
            "/v1/captions", files=[("image", (secret, secret.encode()))], data={"beam": secret}
        )
    finally:
        listening = False
    assert answer.status_code == 422 and secret not in answer.text
    assert written == []
    out, err = capfd.readouterr()
    assert secret not in caplog.text + out + err


def test_an_internal_error_shows_no_traceback_and_quotes_nothing(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with running(served) as (client, _):
        monkeypatch.setattr(
            served, "_run", lambda *a: (_ for _ in ()).throw(RuntimeError("secret"))
        )
        answer = ask(client)
        check_problem(answer, 500, "internal")
        assert "secret" not in answer.text + caplog.text and "RuntimeError at" in caplog.text
        monkeypatch.undo()
        assert ask(client).status_code == 200


# --- protection


def test_the_key_guards_captions_models_and_metrics(served: Served) -> None:
    key = "c0rrect-hörse"
    with running(served, protection=Protection(api_key=key, rate=None)) as (client, _):
        for path in ("/v1/models", "/metrics"):
            answer = client.get(path)
            check_problem(answer, 401, "no_key")
            assert answer.headers["www-authenticate"].startswith("Bearer")
        check_problem(ask(client), 401, "no_key")
        wrong: list[Any] = [
            b"Bearer",
            b"Bearer wrong",
            key.encode(),
            b"Basic " + key.encode(),
            b"Bearer \xff",
        ]
        for value in wrong:
            check_problem(
                client.get("/v1/models", headers={b"Authorization": value}), 401, "no_key"
            )
        for path in ("/", "/page/app.js", "/healthz", "/readyz", "/openapi.json"):
            assert client.get(path).status_code == 200
        secured = client.get("/openapi.json").json()
        assert secured["paths"]["/v1/captions"]["post"]["security"] and "bearer" in str(
            secured["components"]
        )
    with running(served, protection=Protection(api_key="plain", rate=None)) as (client, _):
        for headers in (
            {"Authorization": "Bearer plain"},
            {"X-API-Key": "plain"},
            {"authorization": "bearer plain"},
        ):
            assert client.get("/v1/models", headers=headers).status_code == 200


def test_other_origins_are_allowed_only_if_configured(service: Pair, served: Served) -> None:
    origin = {"Origin": "https://site.example"}
    preflight = origin | {"Access-Control-Request-Method": "POST"}
    assert not any(
        name.startswith("access-control")
        for name in service[0].get("/v1/models", headers=origin).headers
    )
    assert service[0].options("/v1/captions", headers=preflight).status_code == 405
    with running(
        served, protection=Protection(cors=("https://site.example",), api_key="k", rate=None)
    ) as (client, _):
        assert client.options("/v1/captions", headers=preflight).status_code == 200
        for headers in (origin, origin | {"X-API-Key": "k"}):
            answer = client.get("/v1/models", headers=headers)
            assert answer.headers["access-control-allow-origin"] == "https://site.example"
        other = client.get(
            "/v1/models", headers={"Origin": "https://other.example", "X-API-Key": "k"}
        )
        assert "access-control-allow-origin" not in other.headers


def test_requests_per_address_are_limited(served: Served) -> None:
    with running(served, protection=Protection(rate="3/hour")) as (client, _):
        assert [client.get("/v1/models").status_code for _ in range(4)] == [200, 200, 200, 429]
        answer = ask(client)
        check_problem(answer, 429, "rate_limit")
        assert 1 <= int(answer.headers["retry-after"]) <= 3600
        assert client.get("/healthz").status_code == client.get("/").status_code == 200


def test_addresses_and_rates_are_understood() -> None:
    assert client_key({"client": ("10.0.0.7", 1)}) == "10.0.0.7"
    assert client_key({"client": ("2001:db8::1:2:3", 1)}) == client_key(
        {"client": ("2001:db8::9", 1)}
    )
    assert client_key({"client": None}) == "unknown"
    assert len(parse_rate("5/second;100/hour")) == 2 and parse_rate(None) == []
    with pytest.raises(CapGenError, match="cannot be understood"):
        parse_rate("often")


@pytest.mark.parametrize(
    "path", ["/", "/page/app.js", "/v1/models", "/nope", "/page/../../cli.py", "/v1/captions"]
)
def test_every_answer_has_the_security_headers(service: Pair, path: str) -> None:
    answer = service[0].get(path)
    policy = answer.headers["content-security-policy"]
    assert (
        policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        and "http" not in policy
    )
    assert "unsafe" not in policy and "*" not in policy
    assert (
        answer.headers["x-content-type-options"] == "nosniff"
        and answer.headers["x-frame-options"] == "DENY"
    )
    assert answer.status_code in (200, 404, 405)
    if answer.status_code != 200:
        check_problem(
            answer,
            answer.status_code,
            {404: "not_found", 405: "method_not_allowed"}[answer.status_code],
        )


@pytest.mark.parametrize(
    "path",
    [
        "/page/..%2f..%2fcli.py",
        "/page/%2e%2e/service/app.py",
        "/page//etc/hostname",
        "/page/..\\cli.py",
        "/page/",
    ],
)
def test_only_the_folder_of_the_page_can_be_read(service: Pair, path: str) -> None:
    with socket.create_connection(
        (service[0].base_url.host, service[0].base_url.port or 80)
    ) as raw:
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert raw.recv(100).startswith(b"HTTP/1.1 404 ")


def test_answers_are_counted_by_declared_route_only(served: Served) -> None:
    with running(served) as (client, _):
        ask(client)
        ask(client, beam=0)
        for path in ("/made/up", "/v1/captions/x", "/page/none"):
            client.get(path)
        client.request("BREW", "/healthz")
        text = client.get("/metrics").text
    assert 'capgen_requests_total{method="POST",route="/v1/captions",status="200"} 1.0' in text
    assert 'capgen_requests_total{method="POST",route="/v1/captions",status="422"} 1.0' in text
    assert "made" not in text and "BREW" not in text and 'method="other"' in text
    for name in (
        "capgen_batch_images_count 1.0",
        "capgen_queue_images 0.0",
        "capgen_model_seconds",
        "process_resident",
    ):
        assert name in text


# --- hostile


def test_hostile_uploads_do_no_harm(service: Pair, captioner: Captioner) -> None:
    uploads = corpus()
    assert len(uploads) >= 200 and len({each.name for each in uploads}) == len(uploads)
    problems = []
    for each in uploads:
        headers = {
            k: v.encode("latin-1") for k, v in (each.headers | {"content-type": each.kind}).items()
        }
        answer = service[0].post("/v1/captions", content=each.body, headers=headers)
        if answer.status_code >= 500 or (each.fine and answer.status_code != 200):
            problems.append(f"{each.name}: {answer.text}")
        elif (
            answer.status_code != 200
            and answer.headers["content-type"] != "application/problem+json"
        ):
            problems.append(f"{each.name}: no problem, but {answer.text[:100]}")
    assert problems == []
    answer = service[0].post("/v1/captions", files=images(*NAMES)).json()
    expected = captioner.caption([PHOTOS / name for name in NAMES])
    assert [found["caption"] for found in answer["captions"]] == [
        caption.text for caption in expected
    ]


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\0\x01\0",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET  HTTP/1.1\r\n\r\n",
        b"A" * 200_000,
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 50_000 + b"\r\n",
        b"GET /\0 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/captions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/captions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nhello",
        b"POST /v1/captions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
        b"Content-Length: 6\r\n\r\nhello",
        b"POST /v1/captions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n",
    ],
    ids=lambda raw: repr(raw[:30]),
)
def test_malformed_http_does_no_harm(service: Pair, raw: bytes) -> None:
    with socket.create_connection(
        (service[0].base_url.host, service[0].base_url.port or 80)
    ) as connection:
        connection.settimeout(20)
        try:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(1000)
        except OSError:  # it hung up
            answer = b""
    assert not answer or answer.split()[1][:1] in (b"4", b"2"), answer
    assert service[0].get("/readyz").status_code == 200


# --- the command


def test_the_command_prints_its_address_and_finishes_accepted_requests(
    bundle: Path, captioner: Captioner
) -> None:
    with ServeProcess(
        "--bundle", f"mine={bundle}", "--device", "cpu", CAPGEN_API_KEY="key"
    ) as served:
        assert served.address.startswith("http://127.0.0.1:")
        with httpx.Client(
            base_url=served.address, headers={"X-API-Key": "key"}, timeout=100
        ) as client:
            assert httpx.get(f"{served.address}/v1/models").status_code == 401
            assert [m["name"] for m in client.get("/v1/models").json()["models"]] == ["mine"]
            with ThreadPoolExecutor(6) as pool:
                answers = [
                    pool.submit(client.post, "/v1/captions", files=images(*NAMES)) for _ in range(6)
                ]
                until(
                    lambda: "capgen_batch_images_count 0.0" not in client.get("/metrics").text,
                    "the first batch",
                )
                served.process.send_signal(signal.SIGTERM)
                expected = [
                    caption.text for caption in captioner.caption([PHOTOS / name for name in NAMES])
                ]
                for each in answers:
                    found = each.result().json()
                    assert [c["caption"] for c in found["captions"]] == expected
        out, err = served.process.communicate(timeout=100)
        assert served.process.returncode in (0, -signal.SIGTERM) and "Traceback" not in out + err


def test_a_taken_port_a_missing_bundle_and_bad_options_are_explained(
    bundle: Path,
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = capgen("serve", "--bundle", bundle, "--port", str(taken.getsockname()[1]))
    assert (
        done.returncode == 2 and "cannot listen" in done.stderr and "Traceback" not in done.stderr
    )
    for arguments, message in [
        (["--bundle", "/no/such"], "no bundle folder"),
        (["--queue", "1"], "--max-images"),
        (["--rate-limit", "often"], "cannot be understood"),
        (["--batch", "0"], "--batch 0 is not possible"),
        (["--bundle", f"a={bundle}", "--bundle", f"a={bundle}"], "two captioners are called a"),
        (["--bundle", f"a b={bundle}"], "cannot be called"),
    ]:
        with pytest.MonkeyPatch.context() as patch:
            said = io.StringIO()
            patch.setattr(sys, "stderr", said)
            assert main(["serve", *arguments]) == 2
        assert message in said.getvalue()


def test_bundles_are_called_by_their_folder_unless_named() -> None:
    from capgen_utils.apps.cli.serve import name_bundles

    found = dict(name_bundles(["runs/first/bundle/", "some/second", "third=some/where"]))
    assert found == {
        "first": Path("runs/first/bundle"),
        "second": Path("some/second"),
        "third": Path("some/where"),
    }
    assert name_bundles(None) == [("flickr8k_transformer", None)]


def test_a_single_image_waits_no_longer_than_the_window() -> None:
    """The window bounds the wait for other images."""
    started: list[float] = []

    async def work() -> float:
        batcher = Batcher(lambda key, items: started.append(time.monotonic()) or items, 4, 4, 0.0)
        batcher.start()
        done = await batcher.submit("a", [1])
        await batcher.close()
        return done[0].waited

    assert asyncio.run(work()) >= 0 and len(started) == 1
