"""The command line starts fast: neither the package nor any ``--help`` imports heavy libraries."""

import json
import subprocess
import sys
from pathlib import Path

from helpers import ROOT

from capgen_utils.apps.cli.main import make_parser, subparsers

HEAVY = ("torch", "numpy", "transformers", "fastapi", "uvicorn", "pydantic", "PIL", "shtab")

SCRIPT = """
import contextlib, io, json, sys
HEAVY = sys.argv[1].split(",")
import capgen_utils
loaded = {"import": [name for name in HEAVY if name in sys.modules]}
from capgen_utils.apps.cli.main import make_parser, subparsers, main
for arguments in ([], *([name] for name in subparsers(make_parser()))):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*arguments, "--help"])
    assert "usage: capgen" in printed.getvalue()
    loaded[" ".join([*arguments, "--help"])] = [name for name in HEAVY if name in sys.modules]
print(json.dumps(loaded))
"""


def test_neither_the_import_nor_any_help_loads_a_heavy_library(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, ",".join(HEAVY)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    loaded = json.loads(done.stdout)
    assert set(loaded) == {
        "import",
        "--help",
        *(f"{name} --help" for name in subparsers(make_parser())),
    }
    assert loaded == dict.fromkeys(loaded, [])
