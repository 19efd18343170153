"""What goes into the service and what comes out, with bounds for every option."""

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

from capgen_utils.apps.serve.problems import MEDIA_TYPE
from capgen_utils.decoding.options import OPTIONS

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


def _field(name: str) -> Any:
    kind, option = OPTIONS[name]
    return kind | None, Field(default=None, description=option.help, **_bounds(name))


def _as_list(value: Any) -> Any:
    """A form repeats a field that has several values."""
    return value if isinstance(value, list) or value is None else [value]


Temperature = Annotated[float, Field(**_bounds("temperatures"))]
_Decoding: Any = create_model(
    "_Decoding", **{name: _field(name) for name in OPTIONS if name != "temperatures"}
)


class Options(_Decoding):  # type: ignore[misc]
    """How captions are found; the defaults are the captioner's own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(
        default=None,
        min_length=1,
        max_length=100,
        description="one of `/v1/models`; the first one by default",
    )
    rerank: bool = Field(
        default=False, description="let a CLIP choose the caption that fits the image best"
    )
    temperatures: Annotated[list[Temperature] | None, BeforeValidator(_as_list)] = Field(
        default=None,
        min_length=1,
        max_length=16,
        description=OPTIONS["temperatures"][1].help,
    )
    attention: bool = Field(
        default=False, description="also say where the captioner looked for each word"
    )

    def decoding(self) -> dict[str, Any]:
        """Return what ``Captioner.caption`` takes as options."""
        return self.model_dump(exclude={"model", "rerank", "attention"}, exclude_none=True)

    def key(self) -> tuple[Any, ...]:
        """Return what requests have to agree in to be worked on together; a caption is the same
        with attention."""
        values = self.model_dump(exclude={"model", "attention"}, exclude_none=True)
        return tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in values.items()))


class CandidateOut(BaseModel):
    """One caption that was considered."""

    text: str
    log_probability: float = Field(
        description="natural logarithm under the captioner, summed over the tokens"
    )
    score: float = Field(description="what candidates are ranked by, unless a CLIP chose")
    temperature: float = Field(description="what it was drawn at; 0 where it was searched for")
    clip_score: float | None = Field(description="cosine of image and caption, where a CLIP chose")


class Region(BaseModel):
    """The part of the upright image that the grid covers, as shares of its width and height."""

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

    image: int = Field(description="its place in the request, from 0")
    width: int = Field(description="of the upright image, in pixels")
    height: int
    caption: str
    log_probability: float
    ended: bool = Field(description="false where the caption was cut at the maximum length")
    candidates: list[CandidateOut] = Field(description="best first; the first one is the caption")
    attention: Attention | None = Field(
        description="where it was asked for and the caption has words"
    )


class Timing(BaseModel):
    """Where the time went, in milliseconds."""

    total_ms: float
    read_ms: float = Field(description="receiving and decoding the images")
    queue_ms: float = Field(description="the longest wait for the model")
    model_ms: float = Field(description="the longest batch")
    batch: int = Field(description="images that ran together, those of other requests included")


class Captions(BaseModel):
    """The answer to a request."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
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
            ]
        }
    )

    model: str
    decoding: str = Field(description="how the captions were found, in words")
    captions: list[CaptionOut]
    timing: Timing


class ModelOut(BaseModel):
    """A captioner that can be asked for."""

    name: str
    kind: str = Field(description="its architecture, such as `transformer`")
    default: bool
    parameters: int
    tokens: int = Field(description="size of its vocabulary")
    longest: int = Field(description="tokens that a caption can have")
    encoder: str
    attention: bool = Field(description="whether it can say where it looked")
    rerank: bool = Field(description="whether it has a CLIP that chooses")
    decoding: dict[str, Any] = Field(description="its defaults")


class Models(BaseModel):
    """The captioners, the default one first."""

    models: list[ModelOut]
    limits: dict[str, float] = Field(description="of one request")


class Status(BaseModel):
    """How the service is."""

    status: str


class ProblemOut(BaseModel):
    """An error, as RFC 9457 has it."""

    type: str
    title: str
    status: int
    detail: str
    code: str = Field(description="a short name for programs")
    remedy: str | None = None
    errors: list[dict[str, Any]] | None = None


_ERRORS = {
    400: "The body is malformed.",
    408: "The body did not arrive in time.",
    413: "Too many bytes, images, pixels or frames.",
    415: "The body is not multipart/form-data.",
    422: "An image cannot be read, or an option is not possible.",
    503: "The service is starting, ending or full: try again after `Retry-After` seconds.",
    504: "There was no caption in time.",
}


_COMMON = {401: "The API key is missing or wrong.", 429: "Too many requests from one address."}
_RETRY = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}}
_TEXT = """Caption one or several images.

    curl -F image=@photo.jpg http://127.0.0.1:8000/v1/captions
    curl -F image=@a.jpg -F image=@b.png -F beam=1 -F attention=true http://127.0.0.1:8000/v1/captions
    curl -F image=@photo.jpg -F top_p=0.8 -F temperature=1.5 -F candidates=7 http://127.0.0.1:8000/v1/captions

Images are told by their content: JPEG, PNG, WebP, BMP, GIF, TIFF. They are turned upright and forgotten."""


def _multipart() -> dict[str, Any]:
    schema = Options.model_json_schema()
    schema.pop("description", None)
    for each in schema["properties"].values():
        _without_null(each)
    image = {
        "type": "array",
        "minItems": 1,
        "items": {"type": "string", "format": "binary"},
        "description": "the file; repeat the field for several images",
    }
    schema["properties"] = {"image": image} | schema["properties"]
    schema["required"] = ["image"]
    schema["title"] = "CaptionRequest"
    examples = {
        "greedy": {
            "summary": "One image, greedy search",
            "value": {"image": ["(file)"], "beam": 1},
        },
        "sampling": {
            "summary": "Seven draws",
            "value": {
                "image": ["(file)"],
                "top_p": 0.8,
                "temperature": 1.5,
                "candidates": 7,
                "seed": 1,
            },
        },
        "attention": {
            "summary": "With attention maps",
            "value": {"image": ["(file)"], "attention": True},
        },
    }
    encoding = {
        "image": {
            "contentType": "image/jpeg, image/png, image/webp, image/gif, image/bmp, image/tiff"
        }
    }
    return {"multipart/form-data": {"schema": schema, "examples": examples, "encoding": encoding}}


def _without_null(schema: dict[str, Any]) -> None:
    """A form has no null: what is not given is left out."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind.get("type") != "null"]
    if len(kinds) == 1:
        del schema["anyOf"]
        schema.update(kinds[0])
    if schema.get("default", 0) is None:
        del schema["default"]


def _problems(texts: dict[int, str]) -> dict[str, Any]:
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemOut"}}}
    return {
        str(status): {"description": text, "content": content}
        | ({"headers": _RETRY} if status in (429, 503) else {})
        for status, text in texts.items()
    }


CAPTIONS: dict[str, Any] = {
    "description": _TEXT,
    "openapi_extra": {
        "requestBody": {"required": True, "content": _multipart()},
        "responses": _problems(_ERRORS),
    },
}


def describe_api(app: FastAPI, with_key: bool) -> None:
    """Let ``app`` say in its OpenAPI document what is common to its routes."""
    made: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema:
            return app.openapi_schema
        document = made()
        components = document.setdefault("components", {})
        components.setdefault("schemas", {})["ProblemOut"] = ProblemOut.model_json_schema()
        common = {429: _COMMON[429]} | ({401: _COMMON[401]} if with_key else {})
        for path, operations in document["paths"].items():
            for operation in operations.values():
                texts = common if path.startswith(("/v1/", "/metrics")) else {}
                texts = texts | ({503: _ERRORS[503]} if path == "/readyz" else {})
                operation["responses"] = operation["responses"] | _problems(texts)
                if with_key and path.startswith(("/v1/", "/metrics")):
                    operation["security"] = [{"bearer": []}, {"header": []}]
        if with_key:
            components["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            }
        return document

    app.openapi = openapi  # type: ignore[method-assign]
