"""Requests, answers and errors of the service, with bounds for every option, and their OpenAPI."""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model
from starlette.responses import JSONResponse

from capgen_utils.decoding.options import OPTIONS

PROBLEM_TYPE = "application/problem+json"  # RFC 9457

# Tighter than the library's bounds: time and memory of a request grow with these.
_LIMITS = {
    "candidates": 32,
    "beam": 16,
    "groups": 16,
    "diversity": 100,
    "max_length": 200,
    "min_length": 200,
    "no_repeat_ngram": 200,
    "temperature": 10,
    "temperatures": 10,
    "top_k": 100_000,
    "seed": 2**53 - 1,
}


def _bounds(name: str) -> dict[str, Any]:
    kind, option = OPTIONS[name]
    finite = {"allow_inf_nan": False} if kind is float else {}
    return {"ge": option.low, "le": min(option.high, _LIMITS.get(name, option.high))} | finite


Temperature = Annotated[float, Field(**_bounds("temperatures"))]
_Decoding: Any = create_model(  # type: ignore[call-overload]
    "_Decoding",
    **{
        name: (kind | None, Field(default=None, description=option.help, **_bounds(name)))
        for name, (kind, option) in OPTIONS.items()
        if name != "temperatures"
    },
)


class Options(_Decoding):  # type: ignore[misc]
    """Decoding options; the captioner has a default for each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(
        default=None,
        min_length=1,
        max_length=100,
        description="a name from `/v1/models`; the first one by default",
    )
    rerank: bool = Field(
        default=False, description="let a CLIP choose the caption that fits the image best"
    )
    temperatures: list[Temperature] | None = Field(
        default=None,
        min_length=1,
        max_length=16,
        description=OPTIONS["temperatures"][1].help,
    )
    attention: bool = Field(
        default=False, description="also return where the captioner looked for each word"
    )

    def decoding(self) -> dict[str, Any]:
        """Return the options of ``Captioner.caption``."""
        return self.model_dump(exclude={"model", "rerank", "attention"}, exclude_none=True)

    def key(self) -> tuple[Any, ...]:
        """Return what requests must have in common to share a batch; attention does not matter."""
        values = self.model_dump(exclude={"model", "attention"}, exclude_none=True)
        return tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in values.items()))


# --- the answer


class CandidateOut(BaseModel):
    """One of the captions considered."""

    text: str
    log_probability: float = Field(description="natural logarithm, summed over the tokens")
    score: float = Field(description="ranks the candidates, unless a CLIP ranked them")
    temperature: float = Field(description="temperature of sampling; 0 for greedy or beam search")
    clip_score: float | None = Field(description="cosine of image and caption, if re-ranked")


class Region(BaseModel):
    """The part of the upright image that the grid covers, as fractions of its width and height."""

    left: float
    top: float
    width: float
    height: float


class WordAttention(BaseModel):
    """One word and where the captioner looked for it."""

    text: str
    weights: list[float] = Field(description="row by row over the grid; they sum to 1")


class Attention(BaseModel):
    """Where the captioner looked: the mean over all heads of all layers."""

    rows: int
    columns: int
    region: Region
    words: list[WordAttention]


class CaptionOut(BaseModel):
    """The caption of one image."""

    image: int = Field(description="position in the request, from 0")
    width: int = Field(description="of the upright image, in pixels")
    height: int
    caption: str
    log_probability: float
    ended: bool = Field(description="false if the caption was cut at the maximum length")
    candidates: list[CandidateOut] = Field(description="best first; the first one is the caption")
    attention: Attention | None = Field(description="if asked for and the caption has words")


class Timing(BaseModel):
    """Where the time went, in milliseconds."""

    total_ms: float
    read_ms: float = Field(description="receiving and decoding the images")
    queue_ms: float = Field(description="longest wait for the model")
    model_ms: float = Field(description="longest batch")
    batch: int = Field(description="images per batch, including those of other requests")


EXAMPLE: dict[str, Any] = {
    "model": "flickr8k_transformer",
    "decoding": "beam 5, length penalty 1",
    "captions": [
        {
            "image": 0,
            "width": 640,
            "height": 427,
            "caption": "a brown dog is running through the grass",
            "log_probability": -6.21,
            "ended": True,
            "candidates": [
                {
                    "text": "a brown dog is running through the grass",
                    "log_probability": -6.21,
                    "score": -0.69,
                    "temperature": 0.0,
                    "clip_score": None,
                }
            ],
            "attention": None,
        }
    ],
    "timing": {
        "total_ms": 84.1,
        "read_ms": 9.8,
        "queue_ms": 5.2,
        "model_ms": 68.3,
        "batch": 1,
    },
}


class Captions(BaseModel):
    """The answer to a request."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    model: str
    decoding: str = Field(description="how the captions were decoded, in words")
    captions: list[CaptionOut]
    timing: Timing


class ModelOut(BaseModel):
    """One of the captioners."""

    name: str
    kind: str = Field(description="its architecture, such as `transformer`")
    default: bool
    parameters: int
    tokens: int = Field(description="size of its vocabulary")
    longest: int = Field(description="longest caption in tokens")
    encoder: str
    attention: bool = Field(description="whether it attends to regions of the image")
    rerank: bool = Field(description="whether it has a CLIP for re-ranking")
    decoding: dict[str, Any] = Field(description="its defaults")


class Models(BaseModel):
    """The captioners, the default one first."""

    models: list[ModelOut]
    limits: dict[str, float] = Field(description="per request")


class Status(BaseModel):
    """The state of the service."""

    status: str


# --- errors


class ProblemOut(BaseModel):
    """An error in the form of RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    code: str = Field(description="a short name for programs")
    remedy: str | None = None
    errors: list[dict[str, Any]] | None = None


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
        return cls(
            503, code, detail, "try again a little later", headers={"Retry-After": str(seconds)}
        )

    def response(self) -> JSONResponse:
        """Return the answer."""
        body = ProblemOut(
            type="about:blank",
            title=HTTPStatus(self.status).phrase,
            status=self.status,
            detail=self.detail,
            code=self.code,
            remedy=self.remedy or None,
            errors=[dict(error) for error in self.errors] or None,
        )
        return JSONResponse(
            body.model_dump(exclude_none=True), self.status, self.headers, PROBLEM_TYPE
        )


# --- OpenAPI

ERRORS = {
    400: "The body is malformed.",
    401: "The API key is missing or wrong.",
    408: "The body did not arrive in time.",
    413: "Too many bytes, images, pixels or frames.",
    415: "The body is not multipart/form-data.",
    422: "An image cannot be read, or an option is not possible.",
    429: "Too many requests from one address.",
    503: "The service is starting, stopping or full: try again after `Retry-After` seconds.",
    504: "There was no caption in time.",
}

CAPTIONS_TEXT = """Caption one or several images.

    curl -F image=@photo.jpg http://127.0.0.1:8000/v1/captions
    curl -F image=@a.jpg -F image=@b.png -F beam=1 -F attention=true \\
        http://127.0.0.1:8000/v1/captions
    curl -F image=@photo.jpg -F top_p=0.8 -F temperature=1.5 -F candidates=7 \\
        http://127.0.0.1:8000/v1/captions

Formats are recognised by content: JPEG, PNG, WebP, BMP, GIF, TIFF. Images are turned upright, and
discarded after the answer."""


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the description of error answers, for the argument ``responses`` of a route."""
    content = {PROBLEM_TYPE: {"schema": ProblemOut.model_json_schema()}}
    retry = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}}
    return {
        status: {
            "description": ERRORS[status],
            "content": content,
            "headers": retry if status in (429, 503) else {},
        }
        for status in statuses
    }


def caption_request() -> dict[str, Any]:
    """Return the description of a request for captions, for ``openapi_extra`` of its route.

    It is not made from declared ``File`` and ``Form`` parameters: with these, FastAPI would read
    the whole body, onto the disk if it is large, before the first limit could be checked.
    """
    schema = Options.model_json_schema()
    for field in schema["properties"].values():  # forms have no null
        kinds = [kind for kind in field.pop("anyOf", ()) if kind != {"type": "null"}]
        field |= kinds[0] if kinds else {}
        if field["default"] is None:
            del field["default"]
    schema |= {"title": "CaptionRequest", "required": ["image"], "description": "Images, options."}
    schema["properties"] = {
        "image": {
            "type": "array",
            "minItems": 1,
            "items": {"type": "string", "format": "binary"},
            "description": "an image file; repeat the field for several images",
        }
    } | schema["properties"]
    chosen: dict[str, dict[str, Any]] = {
        "One image, greedy search": {"beam": 1},
        "Seven samples": {"top_p": 0.8, "temperature": 1.5, "candidates": 7, "seed": 1},
        "With attention maps": {"attention": True},
    }
    body = {
        "schema": schema,
        "examples": {
            name: {"summary": name, "value": {"image": ["(file)"]} | options}
            for name, options in chosen.items()
        },
        "encoding": {
            "image": {
                "contentType": "image/jpeg, image/png, image/webp, image/gif, image/bmp, image/tiff"
            }
        },
    }
    return {"requestBody": {"required": True, "content": {"multipart/form-data": body}}}
