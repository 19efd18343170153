"""``capgen serve`` without the packages of the extra ``serve``; the service itself is in serve/."""

import sys

import pytest

from capgen_utils.apps.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "package"),
    [
        (["serve"], "uvicorn"),
        (["serve"], "fastapi"),
        (["serve"], "limits"),
        (["serve"], "prometheus_client"),
        (["serve"], "python_multipart"),
        (["serve"], "pydantic"),
        (["completion", "bash"], "shtab"),
    ],
)
def test_a_missing_package_names_the_extra_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    package: str,
) -> None:
    for name in [name for name in sys.modules if name.startswith("capgen_utils.apps.serve.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"capgen {arguments[0]} needs the package {package}" in error
    assert "pip install -e '.[serve]'" in error
