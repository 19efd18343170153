"""Errors as RFC 9457 has them: ``application/problem+json``, one sentence on what is wrong and one
on what to do."""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse

from capgen_utils.common.files import CapGenError

MEDIA_TYPE = "application/problem+json"
RETRY_SECONDS = 1


class Problem(Exception):
    """A request that cannot be answered as asked.

    Args:
        status: of the answer.
        code: a short name for programs, such as ``queue_full``.
        detail: what is wrong, for people.
        remedy: what they can do.
        errors: the places that are wrong, where there are several.
        headers: of the answer.
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
    def busy(cls, detail: str, code: str = "queue_full", seconds: int = RETRY_SECONDS) -> "Problem":
        """Return 503: it can be tried again in some ``seconds``."""
        return cls(
            503, code, detail, "try again a little later", headers={"Retry-After": str(seconds)}
        )

    @classmethod
    def impossible(cls, error: CapGenError) -> "Problem":
        """Return 422 for options that contradict each other or the captioner."""
        return cls(422, "impossible_options", error.problem, error.remedy)

    def response(self) -> JSONResponse:
        """Return the answer."""
        body: dict[str, Any] = {
            "type": "about:blank",
            "title": phrase(self.status),
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
        }
        if self.remedy:
            body["remedy"] = self.remedy
        if self.errors:
            body["errors"] = [dict(error) for error in self.errors]
        return JSONResponse(body, self.status, self.headers, MEDIA_TYPE)


def phrase(status: int) -> str:
    """Return the words that belong to a status code."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"
