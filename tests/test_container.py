"""Dockerfile and compose.yaml agree with the project in versions, paths and port, and are safe."""

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT, need, repository_files

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))


def instructions() -> list[tuple[str, str]]:
    """Return instruction and its value, comments left out and lines joined."""
    lines = "\n".join(line for line in TEXT.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines).splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined if line.strip()]


STEPS = instructions()
LAST = STEPS[max(i for i, (name, _) in enumerate(STEPS) if name == "FROM") :]


def values(name: str, steps: list[tuple[str, str]] = STEPS) -> list[str]:
    return [value for step, value in steps if step == name]


def environment() -> dict[str, str]:
    return dict(part.split("=", 1) for value in values("ENV", LAST) for part in shlex.split(value))


def test_the_python_is_one_that_the_project_supports() -> None:
    (version,) = (value.split("=")[1] for value in values("ARG") if value.startswith("PYTHON="))
    assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]
    assert all(value.split()[0] == "python:${PYTHON}-slim" for value in values("FROM"))


def test_everything_copied_exists_and_is_not_ignored() -> None:
    copied = [
        path for value in values("COPY") if "--from=" not in value for path in value.split()[:-1]
    ]
    assert {
        "capgen_utils",
        "data/bundles",
        "requirements.txt",
        "constraints.txt",
        "pyproject.toml",
    } <= set(copied)
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*", "what is not named stays out"
    for path in copied:
        assert (ROOT / path).exists(), path
        assert f"!{path}" in rules, path
    secret = [".env", ".git", "notebooks", "tests", "data/flickr8k", "data/runs"]
    assert not {f"!{path}" for path in secret} & set(rules)
    assert rules.index("data/*") < rules.index("!data/bundles") and "**/__pycache__" in rules


def test_the_build_is_the_set_up_of_the_makefile() -> None:
    runs = " ".join(values("RUN"))
    assert runs.count("-c constraints.txt") == 2 and '--index-url "${TORCH_INDEX}"' in runs
    assert [v for v in values("ARG") if v.startswith("TORCH_INDEX=")] == [
        "TORCH_INDEX=https://download.pytorch.org/whl/cpu"
    ], "for a processor by default"
    assert "['optional-dependencies']['serve']" in runs, "the service's extra is installed"
    left_out = re.search(r"grep -vE '\^\(([^)]*)\)", runs)
    assert left_out
    required = [
        line.split(">=")[0] for line in (ROOT / "requirements.txt").read_text().splitlines()
    ]
    assert set(left_out[1].split("|")) <= set(required)


def test_serving_imports_no_package_left_out_of_the_image() -> None:
    (pattern,) = re.findall(r"grep -vE '([^']*)'", " ".join(values("RUN")))
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not re.match(pattern, line)]
    gone = {line.split(">=")[0] for line in lines} - {line.split(">=")[0] for line in kept}
    assert gone == {"jupyterlab", "ipywidgets", "kaggle", "kagglehub"}
    served = [
        *(ROOT / "capgen_utils" / "apps" / "serve").glob("*.py"),
        ROOT / "capgen_utils" / "captioner.py",
    ]
    for path in served:
        assert not re.search(
            r"^\s*(import|from) (jupyterlab|ipywidgets|kaggle)", path.read_text(), re.MULTILINE
        ), path


def test_it_runs_without_privileges_on_a_read_only_file_system() -> None:
    (user,) = values("USER", LAST)
    assert (
        user.isdigit() and int(user) >= 10_000 and f"--uid {user}" in " ".join(values("RUN", LAST))
    )
    assert [name for name, _ in LAST].index("USER") > max(
        i for i, (name, _) in enumerate(LAST) if name in "RUN COPY"
    )
    assert "chmod -R a+rX ./*" in values("RUN")[-2], (
        "whatever rights the files had, they can be read"
    )
    env = environment()
    assert (
        env["PYTHONDONTWRITEBYTECODE"] == "1"
        and env["HOME"] == "/tmp"
        and env["CAPGEN_DATA"] == "/data"
    )
    for name in ("capgen", "capgen-gpu", "tensorboard"):
        service = COMPOSE["services"][name]
        assert (
            service["read_only"] is True
            and service["tmpfs"] == ["/tmp"]
            and service["cap_drop"] == ["ALL"]
        )
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), (
            "who wants it public says so"
        )


def test_port_health_and_command_agree_with_the_service() -> None:
    from capgen_utils.apps.cli.main import make_parser

    (entry,), command = (json.loads(values(name, LAST)[0]) for name in ("ENTRYPOINT", "CMD"))
    assert PROJECT["scripts"][entry] == "capgen_utils.apps.cli.main:main"
    options = make_parser().parse_args(command)
    assert options.host == "0.0.0.0" and values("EXPOSE", LAST) == [str(options.port)]
    (health,) = values("HEALTHCHECK", LAST)
    assert f"http://127.0.0.1:{options.port}/healthz" in health
    program = json.loads(health[health.index("[") :])
    assert program[0] == "python"
    compile(program[2], "healthcheck", "exec")
    application = (ROOT / "capgen_utils" / "apps" / "serve" / "app.py").read_text(encoding="utf-8")
    assert '"/healthz"' in application
    for name in ("capgen", "capgen-gpu"):
        assert COMPOSE["services"][name]["ports"][0].endswith(f":{options.port}")


def test_compose_has_a_service_a_gpu_profile_and_tensorboard() -> None:
    services = COMPOSE["services"]
    assert "profiles" not in services["capgen"] and services["capgen"]["build"] == "."
    assert services["capgen-gpu"]["profiles"] == ["gpu"] and services["tensorboard"][
        "profiles"
    ] == ["tensorboard"]
    arguments = services["capgen-gpu"]["build"]["args"]
    assert {name for name in arguments} <= {value.split("=")[0] for value in values("ARG")}
    assert f"--build-arg TORCH_INDEX={arguments['TORCH_INDEX']} " in TEXT, (
        "the one that the Dockerfile's head names"
    )
    (device,) = services["capgen-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]
    assert any(
        line.startswith("tensorboard>=")
        for line in (ROOT / "requirements.txt").read_text().splitlines()
    )


KEYS = {
    "build",
    "cap_drop",
    "command",
    "deploy",
    "entrypoint",
    "environment",
    "healthcheck",
    "image",
    "mem_limit",
    "pids_limit",
    "ports",
    "profiles",
    "read_only",
    "restart",
    "security_opt",
    "stop_grace_period",
    "tmpfs",
    "volumes",
}


def test_compose_uses_only_keys_of_the_specification() -> None:
    assert set(COMPOSE) == {"name", "services", "x-hardened"}
    for name, service in COMPOSE["services"].items():
        assert set(service) <= KEYS, name
        assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in service["ports"])


def test_the_build_context_is_small() -> None:
    sent = [
        p
        for p in repository_files()
        if fnmatch.fnmatch(p.relative_to(ROOT).as_posix(), "data/bundles/*")
    ]
    sent += [p for p in repository_files() if p.relative_to(ROOT).parts[0] == "capgen_utils"]
    assert sent and sum(path.stat().st_size for path in sent) < 200_000_000


@pytest.mark.parametrize("tool", ["hadolint"])
def test_the_linter_finds_nothing(tool: str) -> None:
    need(tool, found := shutil.which(tool) or _beside_python(tool))
    done = subprocess.run(
        [str(found), str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _beside_python(tool: str) -> Path | None:
    import sys

    path = Path(sys.executable).parent / tool
    return path if path.exists() else None
