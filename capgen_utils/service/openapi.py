"""What ``/openapi.json`` says beyond what routes say by themselves: the multipart body, errors, examples, the key."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from capgen_utils.service.problems import MEDIA_TYPE
from capgen_utils.service.schemas import Options, ProblemOut

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
        "greedy": {"summary": "One image, greedy search", "value": {"image": ["(file)"], "beam": 1}},
        "sampling": {
            "summary": "Seven draws",
            "value": {"image": ["(file)"], "top_p": 0.8, "temperature": 1.5, "candidates": 7, "seed": 1},
        },
        "attention": {"summary": "With attention maps", "value": {"image": ["(file)"], "attention": True}},
    }
    encoding = {"image": {"contentType": "image/jpeg, image/png, image/webp, image/gif, image/bmp, image/tiff"}}
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
        str(status): {"description": text, "content": content} | ({"headers": _RETRY} if status in (429, 503) else {})
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
