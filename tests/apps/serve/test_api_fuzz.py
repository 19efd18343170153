"""The API against its own OpenAPI document: valid and invalid requests, the same on every run."""

from collections.abc import Iterator
from typing import Any

import pytest
from helpers import need, save_tiny_bundle
from hypothesis import HealthCheck, Phase, given, seed, settings
from serving_helpers import running

from capgen_utils.apps.serve.served import Served

try:
    import schemathesis
except ImportError:
    schemathesis = None  # type: ignore[assignment]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    need("schemathesis", schemathesis)
    folder = tmp_path_factory.mktemp("fuzzed") / "tiny"
    save_tiny_bundle(folder)
    with running(Served.load("tiny", folder, device="cpu")) as (client, _):
        yield client


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_every_answer_conforms_to_the_openapi_document(service: Any, mode: str) -> None:
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    schema = schemathesis.openapi.from_url(f"{service.base_url}/openapi.json")
    asked = [
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
        checks.response_headers_conformance,
        checks.unsupported_method,
    ]
    made = GenerationMode.POSITIVE if mode == "positive" else GenerationMode.NEGATIVE
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert {operation.path for operation in operations} >= {
        "/v1/captions",
        "/v1/models",
        "/healthz",
        "/readyz",
    }
    seen: list[tuple[str, int]] = []

    def fuzz(operation: Any, number: int, examples: int) -> None:
        @seed(number)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=made))
        def run(case: Any) -> None:
            response = case.call(session=None)
            seen.append((operation.path, response.status_code))
            case.validate_response(response, checks=asked)

        try:
            run()
        except ValueError as error:
            # Schemathesis cannot judge some of the wrong files that it makes up itself; all before
            # them were answered.
            if "Unsupported type: 'Binary'" not in str(error):
                raise

    for operation in operations:
        if operation.method.upper() == "POST":
            for number in range(20260101, 20260107):
                fuzz(operation, number, 10)
        elif mode == "positive":  # these take nothing that could be wrong
            fuzz(operation, 20260101, 5)
    assert sum(path == "/v1/captions" for path, _ in seen) >= 20
    assert any(path == "/v1/captions" and status in (400, 415, 422) for path, status in seen)
    assert service.get("/readyz").status_code == 200
