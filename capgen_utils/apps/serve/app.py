"""The routes: captions, models, health, metrics, and the page."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.staticfiles import StaticFiles

from capgen_utils.apps.serve.observing import Observer
from capgen_utils.apps.serve.problems import Problem, phrase
from capgen_utils.apps.serve.protection import LOG, Budget, Gate, Limits, Protection, Shield
from capgen_utils.apps.serve.queueing import Batcher, Done
from capgen_utils.apps.serve.schemas import (
    CAPTIONS,
    Captions,
    Models,
    Options,
    Status,
    Timing,
    describe_api,
)
from capgen_utils.apps.serve.served import Item, Served, caption_out
from capgen_utils.apps.serve.uploads import Form, open_upload, read_form, too_large
from capgen_utils.common.machine import VERSION

PAGE = Path(__file__).resolve().parent / "page"
DECODERS = 2  # images that are decoded at once: each may take hundreds of megabytes for a moment
LEFT = 499  # nobody reads this answer; the number is what web servers log for it


class Service:
    """The state behind the routes.

    Args:
        captioners: the default one first.
        limits: of requests and of the service.
    """

    def __init__(self, captioners: Sequence[Served], limits: Limits) -> None:
        self.limits, self.default = limits, captioners[0].name
        self.captioners = {served.name: served for served in captioners}
        self.ready, self.failed = False, False
        self.observer = Observer(lambda: self.batcher.waiting)
        self.batcher = Batcher(
            self._run, limits.queue, limits.batch, limits.window, self.observer.ran
        )
        self._decoders = ThreadPoolExecutor(DECODERS, "capgen-decode")
        self._requests = Budget(limits.requests, "requests")
        self._uploads = Budget(limits.upload_bytes, "bytes of uploads")
        self._pixels = Budget(limits.pixel_bytes, "bytes of images")

    async def warm_up(self) -> None:
        """Caption something with every captioner, then be ready."""
        try:
            for served in self.captioners.values():
                await self.batcher.call(served.warm_up)
            self.ready = True
        except Exception as error:
            self.failed = True
            LOG.error("the captioners cannot caption: %s: %s", type(error).__name__, error)

    async def close(self) -> None:
        """Finish what was accepted."""
        self.ready = False
        await self.batcher.close()
        self._decoders.shutdown(wait=True)

    async def caption(self, request: Request) -> Captions:
        """Answer one request within its time.

        Raises:
            Problem: it cannot be answered.
            ClientDisconnect: nobody waits for it any more.
        """
        if not self.ready:
            raise Problem.busy(
                "the service is still starting, or shutting down", "not_ready", seconds=2
            )
        started, code = time.monotonic(), "upload_too_slow"
        try:
            async with asyncio.timeout(self.limits.seconds):
                with self._requests.hold(1):
                    with self._uploads.hold() as hold:
                        form = await self._read(request, hold)
                        code = "deadline"
                        work = self._open(form)
                        options, served, items = await until_left(request, work)
                    return await until_left(request, self._answer(options, served, items, started))
        except TimeoutError as error:
            raise self._too_late(code) from error

    def _too_late(self, code: str) -> Problem:
        if code == "deadline":
            return Problem(
                504,
                code,
                f"there was no caption within {self.limits.seconds:g} s",
                "ask for less at once",
            )
        return Problem(
            408,
            code,
            f"the body did not arrive within {self.limits.seconds:g} s",
            "send smaller images",
        )

    async def _read(self, request: Request, hold: Any) -> Form:
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > self.limits.body_bytes:
            raise too_large(self.limits)
        kind, encoding = (
            request.headers.get(name, "") for name in ("content-type", "content-encoding")
        )
        return await read_form(request.stream(), kind, encoding, self.limits, hold)

    async def _open(self, form: Form) -> tuple[Options, Served, list[Item]]:
        options = read_options(form)
        served = self.captioners.get(options.model or self.default)
        if served is None:
            known = ", ".join(self.captioners)
            raise Problem(
                422,
                "unknown_model",
                f"there is no captioner {options.model!r}",
                f"choose one of: {known}",
            )
        served.check(options)
        loop, items = asyncio.get_running_loop(), []
        for place in range(len(form.images)):
            items.append(
                await loop.run_in_executor(
                    self._decoders, self._open_one, form, place, served, options
                )
            )
        return options, served, items

    def _open_one(self, form: Form, place: int, served: Served, options: Options) -> Item:
        image = open_upload(form.images[place], place, self.limits)
        form.images[place] = bytearray()  # the file is not needed any more
        return served.prepare(image, options)

    async def _answer(
        self, options: Options, served: Served, items: list[Item], started: float
    ) -> Captions:
        read = time.monotonic() - started
        with self._pixels.hold(sum(item.whole_bytes for item in items)):
            done = await self.batcher.submit(
                (served.name, options.key()), [(options, item) for item in items]
            )
        captions = [
            caption_out(i, item, each.result)
            for i, (item, each) in enumerate(zip(items, done, strict=True))
        ]
        timing = _timing(time.monotonic() - started, read, done)
        return Captions(
            model=served.name, decoding=served.check(options), captions=captions, timing=timing
        )

    def _run(self, key: tuple[str, Any], pairs: Sequence[tuple[Options, Item]]) -> Sequence[Any]:
        return self.captioners[key[0]].run(pairs[0][0], [item for _, item in pairs])


def _timing(total: float, read: float, done: Sequence[Done]) -> Timing:
    return Timing(
        total_ms=round(total * 1000, 1),
        read_ms=round(read * 1000, 1),
        queue_ms=round(max(each.waited for each in done) * 1000, 1),
        model_ms=round(max(each.seconds for each in done) * 1000, 1),
        batch=max(each.batch for each in done),
    )


def read_options(form: Form) -> Options:
    """Return the options that a form holds.

    Raises:
        Problem: 422, with every field that is wrong.
    """
    try:
        return Options.model_validate(form.values())
    except ValidationError as error:
        errors = [
            {"field": ".".join(map(str, e["loc"]))[:100], "detail": e["msg"]}
            for e in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        names = ", ".join(sorted({e["field"] for e in errors}))
        raise Problem(
            422, "bad_options", f"these fields are not possible: {names}", "see errors", errors
        ) from error


async def until_left(request: Request, work: Awaitable[Any]) -> Any:
    """Return what ``work`` returns; cancel it when the client goes away first.

    Raises:
        ClientDisconnect: it did.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# --- the application


def create_app(
    captioners: Sequence[Served], limits: Limits | None = None, protection: Protection | None = None
) -> FastAPI:
    """Return the service as an ASGI application; ``app.state.service`` is the ``Service`` behind
    it.

    Args:
        captioners: loaded, the default one first; their names differ.
        limits: of requests.
        protection: whom it answers.

    Raises:
        CapGenError: the rate limit cannot be understood.
    """
    protection = protection or Protection()
    service = Service(captioners, limits or Limits())
    logging.getLogger("python_multipart").setLevel(
        logging.CRITICAL
    )  # it would quote bytes of bodies
    app = FastAPI(
        title="CapGen",
        version=VERSION,
        summary="Captions for photographs.",
        docs_url=None,
        redoc_url=None,
        lifespan=_lifespan,
        exception_handlers={Problem: _problem, HTTPException: _http, ClientDisconnect: _gone},
        redirect_slashes=False,
    )
    app.state.service = service
    _add_routes(app, service)
    describe_api(app, protection.api_key is not None)
    app.mount("/page", StaticFiles(directory=PAGE))
    app.add_middleware(Gate, protection=protection)
    if protection.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=protection.cors,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "X-API-Key"],
            expose_headers=["Retry-After"],
        )
    app.add_middleware(Shield, observe=service.observer.answered)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    service.batcher.start()
    warming = asyncio.create_task(service.warm_up())
    yield
    await warming
    await service.close()


def _add_routes(app: FastAPI, service: Service) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    @app.post(
        "/v1/captions",
        response_model=Captions,
        tags=["captions"],
        summary="Caption images",
        **CAPTIONS,
    )
    async def captions(request: Request) -> Captions:
        return await service.caption(request)

    @app.get("/v1/models", response_model=Models, tags=["captions"], summary="List the captioners")
    async def models() -> Models:
        listed = [
            served.describe(name == service.default) for name, served in service.captioners.items()
        ]
        of = service.limits
        bounds = {
            "body_bytes": of.body_bytes,
            "images": of.images,
            "pixels": of.pixels,
            "seconds": of.seconds,
        }
        return Models(models=listed, limits=bounds)

    @app.get("/healthz", response_model=Status, tags=["health"], summary="Is the process alive?")
    async def healthz() -> Status:
        return Status(status="ok")

    @app.get("/readyz", response_model=Status, tags=["health"], summary="Can it caption?")
    async def readyz() -> Status:
        if not service.ready:
            raise Problem.busy(
                "the captioners failed" if service.failed else "warming up or ending", "not_ready"
            )
        return Status(status="ready")

    @app.get(
        "/metrics",
        tags=["health"],
        summary="Counters in Prometheus' format",
        response_class=Response,
    )
    async def metrics() -> Response:
        return Response(service.observer.text(), media_type="text/plain; version=0.0.4")


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return error.response()


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = phrase(error.status_code).lower().replace(" ", "_")
    return Problem(error.status_code, code, str(error.detail), headers=error.headers).response()


async def _gone(request: Request, error: Exception) -> Response:
    request.app.state.service.observer.left()
    return JSONResponse(None, LEFT)
