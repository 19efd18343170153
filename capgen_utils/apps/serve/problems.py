"""Errors in the form of RFC 9457, ``application/problem+json``: what is wrong and what to do."""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse

MEDIA_TYPE = "application/problem+json"


class Problem(Exception):
    """A request that cannot be answered.

    Args:
        status: HTTP status code.
        code: a short name for programs, such as ``queue_full``.
        detail: what is wrong, for people.
        remedy: what they can do.
        errors: details of each error, if there are several.
        headers: extra headers of the answer.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        remedy: str = "",
        errors: Sequence[Mapping[str, Any]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail, self.remedy = status, code, detail, remedy
        self.errors, self.headers = errors, dict(headers or {})

    @classmethod
    def busy(cls, detail: str, code: str = "queue_full", seconds: int = 1) -> "Problem":
        """Return 503, with the ``seconds`` after which to try again."""
        headers = {"Retry-After": str(seconds)}
        return cls(503, code, detail, "try again a little later", headers=headers)

    def response(self) -> JSONResponse:
        """Return the answer."""
        body = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
        }
        optional = {"remedy": self.remedy, "errors": [dict(error) for error in self.errors]}
        body |= {name: value for name, value in optional.items() if value}
        return JSONResponse(body, self.status, self.headers, MEDIA_TYPE)
