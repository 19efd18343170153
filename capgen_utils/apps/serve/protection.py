"""What stands around every route: headers that browsers obey, API key, rate limit, and no traceback
to anybody."""

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import math
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import limits as rates
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from capgen_utils.apps.serve.problems import Problem
from capgen_utils.common.files import CapGenError

LOG = logging.getLogger("capgen.service")


CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cross-Origin-Opener-Policy": "same-origin",
}


_GUARDED = (
    "/v1/",
    "/metrics",
)  # by key and rate limit; who asks whether the service is alive needs neither


_DRAIN_BYTES, _DRAIN_SECONDS = 50_000_000, 1.0


Observe = Callable[[str, str, int, float], None]


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
        rate: requests that one address may make, as ``limits`` writes it: ``300/minute``; ``None``
            for no limit.
    """

    api_key: str | None = None
    cors: tuple[str, ...] = ()
    rate: str | None = "300/minute"


class Shield:
    """The outermost layer: security headers on every answer, every error a problem, every answer
    counted.

    Args:
        app: what it stands around.
        observe: gets route, method, status and seconds of each answer.
    """

    def __init__(self, app: ASGIApp, observe: Observe) -> None:
        self._app, self._observe = app, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, body = time.perf_counter(), 0, _Body(scope, receive)

        async def guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                add_headers(scope, message)
                if not await body.drained():
                    MutableHeaders(scope=message)["Connection"] = (
                        "close"  # else the server would read on for ever
                    )
            await send(message)

        try:
            await self._app(scope, body, guarded)
        except Exception as error:
            LOG.error(
                "%s at %s", type(error).__name__, _where(error)
            )  # no message: it may quote an upload
            if status:
                raise
            failed = Problem(
                500,
                "internal",
                "the service failed at this request",
                "it has been noted in the log",
            )
            await failed.response()(scope, body, guarded)
        finally:
            self._observe(
                route_of(scope), scope["method"], status or 499, time.perf_counter() - started
            )


class _Body:
    """The body of a request on its way in, and what is left of it when it was refused."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        headers = Headers(scope=scope)
        announced = headers.get("content-length", "0")
        self._receive, self._ended = (
            receive,
            "transfer-encoding" not in headers and announced.strip("0") == "",
        )

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body"):
            self._ended = True
        return message

    async def drained(self) -> bool:
        """Throw away a moderate rest, so that a client that is still sending reads why; return
        whether that was all."""
        left = _DRAIN_BYTES
        try:
            async with asyncio.timeout(_DRAIN_SECONDS):
                while not self._ended and left > 0:
                    left -= len((await self()).get("body", b""))
        except TimeoutError:
            pass
        return self._ended


def _where(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return (
        f"{trace.tb_frame.f_code.co_qualname}:{trace.tb_lineno}"
        if trace is not None
        else "an unknown place"
    )


def route_of(scope: MutableMapping[str, Any]) -> str:
    """Return the route that answered, as it was declared; ``other`` for paths that do not exist."""
    path = getattr(scope.get("route"), "path", None) or scope.get("root_path") or ""
    return path if path else "other"


def add_headers(scope: Scope, message: Message) -> None:
    """Add the security headers to the beginning of an answer; what a route set itself stays."""
    headers = MutableHeaders(scope=message)
    for name, value in HEADERS.items():
        headers.setdefault(name, value)
    headers.setdefault("Cache-Control", "no-store")


class Gate:
    """Lets in whom the service answers: so many requests an address, and only with the key where
    there is one.

    Args:
        app: what it stands before.
        protection: key and rate.

    Raises:
        CapGenError: the rate cannot be understood.
    """

    def __init__(self, app: ASGIApp, protection: Protection) -> None:
        self._app = app
        self._digest = _digest(protection.api_key) if protection.api_key else None
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._rates = parse_rate(protection.rate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401 or 429."""
        if (
            scope["type"] == "http"
            and scope["path"].startswith(_GUARDED)
            and scope["method"] != "OPTIONS"
        ):
            try:
                self._check_rate(scope)  # before the key: guessing keys is limited too
                self._check_key(Headers(scope=scope))
            except Problem as problem:
                await problem.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check_rate(self, scope: Scope) -> None:
        client = client_key(scope)
        for rate in self._rates:
            if not self._limiter.hit(rate, client):
                reset = self._limiter.get_window_stats(rate, client).reset_time
                seconds = str(max(1, math.ceil(reset - time.time())))
                raise Problem(
                    429,
                    "rate_limit",
                    f"more than {rate} from one address",
                    f"wait {seconds} seconds",
                    headers={"Retry-After": seconds},
                )

    def _check_key(self, headers: Headers) -> None:
        if self._digest is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        key = given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not hmac.compare_digest(_digest(key), self._digest):
            raise Problem(
                401,
                "no_key",
                "the API key is missing or wrong",
                "send the header: Authorization: Bearer KEY",
                headers={"WWW-Authenticate": 'Bearer realm="capgen"'},
            )


def _digest(key: str) -> bytes:
    """Digests are of one length, so that comparing them takes the same time for every key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def parse_rate(rate: str | None) -> list[Any]:
    """Return the limits that ``rate`` names, none for ``None``.

    Raises:
        CapGenError: it cannot be understood.
    """
    if rate is None:
        return []
    try:
        return list(rates.parse_many(rate))
    except ValueError as error:
        raise CapGenError(
            f"the rate limit {rate!r} cannot be understood", "write it as 300/minute, or none"
        ) from error


def client_key(scope: Scope) -> str:
    """Return what stands for a client: its address, of IPv6 the network that one customer gets
    (/64)."""
    host = (scope.get("client") or ("unknown", 0))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return str(host)
    return (
        str(ipaddress.ip_network((address, 64), strict=False))
        if address.version == 6
        else str(address)
    )


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
