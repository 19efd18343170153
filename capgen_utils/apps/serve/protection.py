"""Protection around every route: limits, security headers, API key, rate limit, no tracebacks."""

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import limits as rates
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from capgen_utils.apps.serve.schemas import Problem
from capgen_utils.common.files import CapGenError

LOG = logging.getLogger("capgen.service")

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; media-src 'self' blob:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}

GUARDED = ("/v1/", "/metrics")  # by key and rate limit; the page and health checks are open

DRAIN_BYTES, DRAIN_SECONDS = 50_000_000, 1.0


# --- limits


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and what the service holds at once.

    Attributes:
        body_bytes: bytes per request, counted as they arrive.
        images: images per request.
        pixels: pixels per image, read from its header before anything is decoded.
        frames: frames of an animation or pages of a document; the first one is captioned.
        seconds: from the first byte of a request to its answer.
        requests: requests in progress; further ones are refused before their body is read.
        upload_bytes: bytes of all bodies held at once.
        pixel_bytes: bytes of all decoded images that wait in full size.
        queue: images that wait for the model.
        batch: images that go through the model together.
        window: seconds that an image waits for others while the model is idle.
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


class Budget:
    """An amount that requests share. They all run on one event loop, so no lock is needed.

    Args:
        total: the whole amount.
        of: what it counts, in the plural.
    """

    def __init__(self, total: int, of: str) -> None:
        self.total, self.of, self.used = total, of, 0

    @contextmanager
    def hold(self, amount: int = 0) -> Iterator[Callable[[int], None]]:
        """Take ``amount`` and yield a function that takes more; all of it is returned at the end.

        Raises:
            Problem: 503, not enough is left; the function raises it too.
        """
        held = 0

        def take(more: int) -> None:
            nonlocal held
            if self.used + more > self.total:
                raise Problem.busy(f"the service holds as many {self.of} as it can")
            self.used += more
            held += more

        try:
            take(amount)
            yield take
        finally:
            self.used -= held


# --- headers and errors


class Shield:
    """The outermost layer: adds security headers, turns errors into problems, counts answers.

    Args:
        app: the application inside.
        observe: receives route, method, status and seconds of each answer.
    """

    def __init__(self, app: ASGIApp, observe: Callable[[str, str, int, float], None]) -> None:
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
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)  # a route's own value stays
                if not await body.drained():
                    headers["Connection"] = "close"  # else the server would keep reading
            await send(message)

        try:
            await self._app(scope, body, guarded)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            # The message is left out: it may quote an upload.
            LOG.error("%s at %s:%s", type(error).__name__, frame.name, frame.lineno)
            if status:
                raise
            failed = Problem(500, "internal", "the request failed", "the error has been logged")
            await failed.response()(scope, body, guarded)
        finally:
            # The route as declared, so that clients cannot make up names.
            route = getattr(scope.get("route"), "path", None) or scope.get("root_path") or "other"
            self._observe(route, scope["method"], status or 499, time.perf_counter() - started)


class _Body:
    """The body of a request, which is read to its end even if the request is refused."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        headers = Headers(scope=scope)
        self._receive = receive
        announced = headers.get("content-length", "0").strip("0")
        self._ended = "transfer-encoding" not in headers and not announced

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body"):
            self._ended = True
        return message

    async def drained(self) -> bool:
        """Discard a moderate rest, so that a client still sending reads the answer.

        Returns:
            Whether the body has ended.
        """
        left = DRAIN_BYTES
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while not self._ended and left > 0:
                    left -= len((await self()).get("body", b""))
        return self._ended


# --- API key and rate limit


@dataclass(frozen=True)
class Protection:
    """Which clients the service answers.

    Attributes:
        api_key: required for captions, models and metrics; ``None`` admits everyone.
        cors: origins whose pages may call the service; none by default.
        rate: requests per address, in the notation of ``limits``: ``300/minute``; ``None`` for no
            limit.
    """

    api_key: str | None = None
    cors: tuple[str, ...] = ()
    rate: str | None = "300/minute"


class Gate:
    """Enforces rate limit and API key.

    Args:
        app: the application inside.
        protection: key and rate.

    Raises:
        CapGenError: the rate is malformed.
    """

    def __init__(self, app: ASGIApp, protection: Protection) -> None:
        self._app = app
        self._digest = _digest(protection.api_key) if protection.api_key else None
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._rates = parse_rate(protection.rate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401 or 429."""
        guarded = scope["type"] == "http" and scope["path"].startswith(GUARDED)
        if guarded and scope["method"] != "OPTIONS":
            try:
                self.check(scope)
            except Problem as problem:
                await problem.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def check(self, scope: Scope) -> None:
        """Count a request and compare its key.

        Raises:
            Problem: 429, too many requests; 401, no or another key.
        """
        client = client_key(scope)
        for rate in self._rates:  # before the key, so that guessing keys is limited too
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
        headers = Headers(scope=scope)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if self._digest is not None and not hmac.compare_digest(_digest(key), self._digest):
            raise Problem(
                401,
                "no_key",
                "the API key is missing or wrong",
                "send the header: Authorization: Bearer KEY",
                headers={"WWW-Authenticate": 'Bearer realm="capgen"'},
            )


def _digest(key: str) -> bytes:
    """Return a hash of fixed length, so that comparing takes the same time for every key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def parse_rate(rate: str | None) -> list[Any]:
    """Return the limits in ``rate``; none for ``None``.

    Raises:
        CapGenError: it is malformed.
    """
    try:
        return [] if rate is None else list(rates.parse_many(rate))
    except ValueError as error:
        raise CapGenError(
            f"the rate limit {rate!r} cannot be understood", "write it as 300/minute, or none"
        ) from error


def client_key(scope: Scope) -> str:
    """Return a client's address; for IPv6, the /64 network that one customer gets."""
    host = (scope.get("client") or ("unknown", 0))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return str(host)
    prefix = 64 if address.version == 6 else 32
    return str(ipaddress.ip_network((address, prefix), strict=False).network_address)
