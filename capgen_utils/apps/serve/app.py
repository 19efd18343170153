"""The routes of the service: captions, models, health, metrics, and the page."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Security
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.security import APIKeyHeader, HTTPBearer
from prometheus_client import generate_latest
from pydantic import ValidationError
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.staticfiles import StaticFiles

from capgen_utils.apps.serve.observing import Observer
from capgen_utils.apps.serve.protection import LOG, Budget, Gate, Limits, Protection, Shield
from capgen_utils.apps.serve.queueing import Batcher
from capgen_utils.apps.serve.schemas import (
    CAPTIONS_TEXT,
    Captions,
    Models,
    Options,
    Problem,
    Status,
    Timing,
    caption_request,
    problems,
)
from capgen_utils.apps.serve.served import Item, Served, caption_out
from capgen_utils.apps.serve.uploads import IMAGE_FIELD, open_upload, read_form
from capgen_utils.common.files import CapGenError
from capgen_utils.common.machine import VERSION

PAGE = Path(__file__).resolve().parent / "page"
DECODERS = 2  # images decoded at once: each may take hundreds of megabytes for a moment


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
            lambda key, pairs: self.captioners[key[0]].run(pairs[0][0], [i for _, i in pairs]),
            limits.queue,
            limits.batch,
            limits.window,
            self.observer.ran,
        )
        self._decoders = ThreadPoolExecutor(DECODERS, "capgen-decode")
        self._requests = Budget(limits.requests, "requests")
        self._uploads = Budget(limits.upload_bytes, "bytes of uploads")
        self._pixels = Budget(limits.pixel_bytes, "bytes of images")

    async def warm_up(self) -> None:
        """Caption an image with every captioner, then be ready."""
        try:
            for served in self.captioners.values():
                await self.batcher.call(served.warm_up)
            self.ready = True
        except Exception as error:
            self.failed = True
            LOG.error("the captioners cannot caption: %s: %s", type(error).__name__, error)

    async def close(self) -> None:
        """Finish all accepted requests."""
        self.ready = False
        await self.batcher.close()
        self._decoders.shutdown(wait=True)

    async def caption(self, request: Request) -> Captions:
        """Answer one request within its time.

        Raises:
            Problem: it cannot be answered.
            ClientDisconnect: the client disconnected.
        """
        if not self.ready:
            raise Problem.busy("the service is starting or shutting down", "not_ready", seconds=2)
        started, within = time.monotonic(), f"within {self.limits.seconds:g} s"
        late = Problem(
            408, "upload_too_slow", f"the body did not arrive {within}", "send smaller images"
        )
        try:
            async with asyncio.timeout(self.limits.seconds):
                with self._requests.hold(1):
                    with self._uploads.hold() as take:
                        form = await read_form(request, self.limits, take)
                        late = Problem(
                            504,
                            "deadline",
                            f"there was no caption {within}",
                            "ask for less at once",
                        )
                        opened = await until_left(request, self._open(form))
                    return await until_left(request, self._answer(started, *opened))
        except TimeoutError as error:
            raise late from error

    async def _open(self, form: FormData) -> tuple[Options, Served, str, list[Item]]:
        """Return options, captioner, its decoding in words, and the images of a request."""
        options = read_options(form)
        served = self.captioners.get(options.model or self.default)
        if served is None:
            raise Problem(
                422,
                "unknown_model",
                f"there is no captioner {options.model!r}",
                f"choose one of: {', '.join(self.captioners)}",
            )
        try:
            decoding = served.check(options)
        except CapGenError as error:
            raise Problem(422, "impossible_options", error.problem, error.remedy) from error

        def open_one(index: int, upload: Any) -> Item:
            with upload.file as file:  # closing it frees its memory
                return served.prepare(open_upload(file.read(), index, self.limits), options)

        run = asyncio.get_running_loop().run_in_executor
        items = [
            await run(self._decoders, open_one, i, upload)
            for i, upload in enumerate(form.getlist(IMAGE_FIELD))
        ]
        return options, served, decoding, items

    async def _answer(
        self, started: float, options: Options, served: Served, decoding: str, items: list[Item]
    ) -> Captions:
        read = time.monotonic() - started
        with self._pixels.hold(sum(item.whole_bytes for item in items)):
            done = await self.batcher.submit(
                (served.name, options.key()), [(options, item) for item in items]
            )
        return Captions(
            model=served.name,
            decoding=decoding,
            captions=[
                caption_out(i, item, *each.result)
                for i, (item, each) in enumerate(zip(items, done, strict=True))
            ],
            timing=Timing(
                total_ms=round((time.monotonic() - started) * 1000, 1),
                read_ms=round(read * 1000, 1),
                queue_ms=round(max(each.waited for each in done) * 1000, 1),
                model_ms=round(max(each.seconds for each in done) * 1000, 1),
                batch=max(each.batch for each in done),
            ),
        )


def read_options(form: FormData) -> Options:
    """Return the options in a form, in which empty fields stand for defaults.

    Raises:
        Problem: 422, with every field that is wrong.
    """
    fields = {
        name: [v for v in form.getlist(name) if not isinstance(v, str) or v.strip()]
        for name in form
        if name != IMAGE_FIELD
    }
    try:
        return Options.model_validate(
            {
                name: values if name == "temperatures" or len(values) > 1 else values[0]
                for name, values in fields.items()
                if values
            }
        )
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
    """Return the result of ``work``; cancel it if the client disconnects first.

    Raises:
        ClientDisconnect: it did.
    """

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


# --- the application


def create_app(
    captioners: Sequence[Served], limits: Limits | None = None, protection: Protection | None = None
) -> FastAPI:
    """Return the service as an ASGI application; ``app.state.service`` is its ``Service``.

    Args:
        captioners: loaded, the default one first; their names differ.
        limits: of requests.
        protection: which clients it answers.

    Raises:
        CapGenError: the rate limit is malformed.
    """
    protection = protection or Protection()
    service = Service(captioners, limits or Limits())
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it would quote bodies

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        warming = asyncio.create_task(service.warm_up())
        yield
        await warming
        await service.close()

    app = FastAPI(
        title="CapGen",
        version=VERSION,
        summary="Captions for photographs.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        exception_handlers=dict.fromkeys((Problem, HTTPException, ClientDisconnect), answer_error),
        redirect_slashes=False,
    )
    app.state.service = service
    app.include_router(guarded_routes(service, protection.api_key is not None))
    app.include_router(open_routes(service))
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


async def answer_error(request: Request, error: Exception) -> Response:
    """Return the answer for an error of a route."""
    if isinstance(error, ClientDisconnect):
        request.app.state.service.observer.left.inc()
        return JSONResponse(None, 499)  # web servers log this for a disconnected client
    if isinstance(error, HTTPException):
        status, headers = error.status_code, error.headers
        code = HTTPStatus(status).phrase.lower().replace(" ", "_")
        error = Problem(status, code, str(error.detail), headers=headers)
    assert isinstance(error, Problem)
    return error.response()


def guarded_routes(service: Service, with_key: bool) -> APIRouter:
    """Return the routes that ``Gate`` guards.

    The security declared here only documents the key, which ``Gate`` compares before any body is
    read.
    """
    router = APIRouter(
        dependencies=[
            Security(HTTPBearer(scheme_name="bearer", auto_error=False)),
            Security(APIKeyHeader(name="X-API-Key", scheme_name="header", auto_error=False)),
        ]
        if with_key
        else [],
        responses=problems(401, 429) if with_key else problems(429),
    )

    @router.post(
        "/v1/captions",
        tags=["captions"],
        summary="Caption images",
        description=CAPTIONS_TEXT,
        responses=problems(400, 408, 413, 415, 422, 503, 504),
        openapi_extra=caption_request(),
    )
    async def captions(request: Request) -> Captions:
        return await service.caption(request)

    @router.get("/v1/models", tags=["captions"], summary="List the captioners")
    async def models() -> Models:
        names = ("body_bytes", "images", "pixels", "seconds")
        return Models(
            models=[
                each.describe(each.name == service.default) for each in service.captioners.values()
            ],
            limits={name: getattr(service.limits, name) for name in names},
        )

    @router.get("/metrics", tags=["health"], summary="Prometheus metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(
            generate_latest(service.observer.registry), media_type="text/plain; version=0.0.4"
        )

    return router


def open_routes(service: Service) -> APIRouter:
    """Return the routes that need no key: the page and the health checks."""
    router = APIRouter()

    @router.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    @router.get("/healthz", tags=["health"], summary="Is the process alive?")
    async def healthz() -> Status:
        return Status(status="ok")

    @router.get(
        "/readyz", tags=["health"], summary="Is the service ready?", responses=problems(503)
    )
    async def readyz() -> Status:
        if service.ready:
            return Status(status="ready")
        state = "the captioners failed" if service.failed else "warming up or shutting down"
        raise Problem.busy(state, "not_ready")

    return router
