"""torchvision imports beside any build of torch."""

import importlib

import pytest
from helpers import run_python

from capgen_utils.common import hub


@pytest.mark.parametrize("module", ["torchvision", "timm", "transformers"])
def test_libraries_import_after_torchvision_was_made_to(module: str) -> None:
    script = "from capgen_utils.common.hub import import_torchvision as f; assert f() is f()"
    script += f"; import {module}"
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(RuntimeError, match="something else"):
        hub.import_torchvision()
