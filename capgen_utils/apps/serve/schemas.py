"""Requests, answers and errors of the service, with bounds for every option, and their OpenAPI."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from capgen_utils.apps.serve.problems import MEDIA_TYPE

LARGEST_BEAM = 16  # per request: memory and time grow with it
MOST_CANDIDATES = 32
LONGEST = 200


# --- the request


def _finite(low: float, high: float, text: str) -> Any:
    return Field(default=None, ge=low, le=high, allow_inf_nan=False, description=text)


def _as_list(value: Any) -> Any:
    """A form repeats a field to give several values."""
    return value if isinstance(value, list) or value is None else [value]


Temperature = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]


class Options(BaseModel):
    """Decoding options; the captioner has a default for each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(
        default=None,
        min_length=1,
        max_length=100,
        description="a name from `/v1/models`; the first one by default",
    )
    candidates: int | None = Field(
        default=None,
        ge=1,
        le=MOST_CANDIDATES,
        description="captions to consider: as many draws, or a beam as wide",
    )
    beam: int | None = Field(
        default=None, ge=1, le=LARGEST_BEAM, description="hypotheses kept; 1 is greedy search"
    )
    groups: int | None = Field(
        default=None, ge=1, le=LARGEST_BEAM, description="groups that share the beam, apart"
    )
    diversity: float | None = _finite(0, 100, "how much the groups keep apart")
    length_penalty: float | None = _finite(-10, 10, "above 0 favours long captions in beam search")
    max_length: int | None = Field(
        default=None, ge=1, le=LONGEST, description="longest caption in tokens"
    )
    min_length: int | None = Field(
        default=None, ge=0, le=LONGEST, description="shortest caption in tokens"
    )
    temperature: float | None = _finite(
        0, 10, "above 0 draws captions: low ones are safe, high ones varied"
    )
    top_k: int | None = Field(
        default=None, ge=0, le=100_000, description="draw among so many most likely tokens"
    )
    top_p: float | None = _finite(0.001, 1, "draw among the tokens that hold this probability")
    seed: int | None = Field(default=None, ge=0, le=2**53 - 1, description="of what is drawn")
    repetition_penalty: float | None = _finite(
        0.01, 100, "above 1 avoids tokens that were said before"
    )
    no_repeat_ngram: int | None = Field(
        default=None, ge=0, le=LONGEST, description="no run of so many tokens twice"
    )
    rerank: bool = Field(
        default=False, description="let a CLIP choose the caption that fits the image best"
    )
    temperatures: Annotated[list[Temperature] | None, BeforeValidator(_as_list)] = Field(
        default=None,
        min_length=1,
        max_length=16,
        description="with `rerank`: draw one caption at each temperature",
    )
    attention: bool = Field(
        default=False, description="also return where the captioner looked for each word"
    )

    def decoding(self) -> dict[str, Any]:
        """Return the options of ``Captioner.caption``."""
        return self.model_dump(
            exclude={"model", "rerank", "temperatures", "attention"}, exclude_none=True
        )

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


class ProblemOut(BaseModel):
    """An error in the form of RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    code: str = Field(description="a short name for programs")
    remedy: str | None = None
    errors: list[dict[str, Any]] | None = None


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
    content = {MEDIA_TYPE: {"schema": ProblemOut.model_json_schema()}}
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
    image = {
        "type": "array",
        "minItems": 1,
        "items": {"type": "string", "format": "binary"},
        "description": "an image file; repeat the field for several images",
    }
    schema |= {"title": "CaptionRequest", "required": ["image"], "description": "Images, options."}
    schema["properties"] = {"image": image} | schema["properties"]
    chosen: dict[str, dict[str, Any]] = {
        "One image, greedy search": {"beam": 1},
        "Seven samples": {"top_p": 0.8, "temperature": 1.5, "candidates": 7, "seed": 1},
        "With attention maps": {"attention": True},
    }
    examples = {
        name: {"summary": name, "value": {"image": ["(file)"]} | options}
        for name, options in chosen.items()
    }
    formats = "image/jpeg, image/png, image/webp, image/gif, image/bmp, image/tiff"
    body = {"schema": schema, "examples": examples, "encoding": {"image": {"contentType": formats}}}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": body}}}
