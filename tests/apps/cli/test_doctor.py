"""`capgen doctor` tells broken from merely missing, and every remedy can be acted on."""

import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import torch

from capgen_utils.apps.cli import doctor
from capgen_utils.apps.cli.doctor import Finding


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(requests, "head", _refuse)
    monkeypatch.setenv("CAPGEN_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "kaggle"))
    for name in ("CAPGEN_FLICKR8K", "KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def _refuse(*args: object, **kwargs: object) -> None:
    raise requests.ConnectionError("no network in this test")


def _named(name: str) -> Finding:
    return next(finding for finding in doctor.examine() if finding.name == name)


def test_a_working_machine_without_network_and_data_is_healthy() -> None:
    findings = doctor.examine()
    assert [f for f in findings if f.ok is False] == []
    assert doctor.exit_code(findings) == 0
    names = {f.name for f in findings}
    assert {
        "Python",
        "packages",
        "torchvision",
        "device",
        "dtype",
        "processor",
        "memory",
        "disk",
    } <= names
    assert {
        "data: shapes",
        "data: flickr8k",
        "encoder: efficientnet_lite0",
        "encoder: resnet50",
    } <= names
    assert {"network: huggingface.co", "Kaggle key"} <= names


def test_examine_writes_nothing(tmp_path: Path) -> None:
    doctor.examine()
    assert list(tmp_path.iterdir()) == []


def test_report_is_aligned_and_shows_remedies_only_where_something_is_missing() -> None:
    findings = [
        Finding("a", "fine", True, "never shown"),
        Finding("long name", "gone", None, "fetch it"),
        Finding("b", "broken", False, "mend it"),
    ]
    lines = doctor.report(findings).splitlines()
    assert lines[0] == "✓ a          fine"
    assert lines[1] == "– long name  gone"
    assert lines[2].strip() == "-> fetch it" and lines[2].index("->") == lines[1].index("gone")
    assert lines[3] == "✗ b          broken"
    assert "never shown" not in "\n".join(lines)
    assert lines[-1] == "1 of 3 need repair"
    assert doctor.exit_code(findings) == 1
    assert doctor.exit_code(findings[:2]) == 0
    assert doctor.report([])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_device_runs_on_the_processor(dtype: torch.dtype) -> None:
    doctor.check_device(torch.device("cpu"), dtype)


def test_check_device_notices_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.nn.functional, "conv2d", lambda image, kernel: torch.zeros(1, 4, 6, 6)
    )
    with pytest.raises(RuntimeError, match="wrong result"):
        doctor.check_device(torch.device("cpu"), torch.float32)


def test_a_card_without_kernels_gets_the_advice_to_choose_a_t4(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(device: torch.device, dtype: torch.dtype) -> None:
        raise RuntimeError(
            "CUDA error: no kernel image is available for execution on the device\nCompile with ..."
        )

    monkeypatch.setattr(doctor, "check_device", fail)
    finding = _named("device")
    assert finding.ok is False
    assert "no kernel image" in finding.value and "\n" not in finding.value
    assert "T4 instead of P100" in finding.remedy


def test_other_device_errors_have_other_remedies() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert "end it" in doctor.device_remedy("CUDA out of memory. Tried to allocate ...", cuda)
    assert "CUDA_VISIBLE_DEVICES" in doctor.device_remedy(
        "CUDA driver version is insufficient", cuda
    )
    assert "pip install" in doctor.device_remedy("illegal instruction", cpu)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_check_device_runs_on_a_gpu() -> None:
    finding = _named("device")
    assert finding.ok and "cuda" in finding.value
    assert "compute capability" in _named("dtype").value


def test_missing_and_old_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=99", "no-such-package-of-ours>=1.5", "jupyterlab>=999", "numpy>=1"]
    monkeypatch.setattr(doctor, "requirement_lines", lambda: lines)
    findings = doctor.examine()
    by_name = {f.name: f for f in findings}
    assert by_name["torch"].ok is False and "too old" in by_name["torch"].value
    assert by_name["no-such-package-of-ours"].ok is False
    assert (
        "pip install -c constraints.txt 'no-such-package-of-ours>=1.5'"
        in by_name["no-such-package-of-ours"].remedy
    )
    assert by_name["jupyterlab"].ok is None, "captions need no JupyterLab"
    assert by_name["packages"].value.startswith("1 of 4 as required: numpy")
    assert doctor.exit_code(findings) == 1


def test_requirements_are_read_from_the_clone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert any(line.startswith("torch>=") for line in doctor.requirement_lines())
    (tmp_path / "requirements.txt").write_text("# a comment\n\ntorch>=2.4  # why\n")
    monkeypatch.setattr("capgen_utils.common.paths.REPOSITORY", tmp_path)
    assert doctor.requirement_lines() == ["torch>=2.4"]


def test_torchvision_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "import_torchvision", _refuse)
    finding = _named("torchvision")
    assert finding.ok is False and "torch torchvision" in finding.remedy


def test_a_full_disk_is_a_warning_and_a_read_only_folder_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(total=9, used=8, free=1_000_000_000)
    )
    finding = _named("disk")
    assert finding.ok is None and "CAPGEN_DATA" in finding.remedy and "1.0 GB" in finding.value
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert _named("disk").ok is False


def test_flickr8k_is_found_by_its_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = _named("data: flickr8k")
    assert missing.ok is None and "CAPGEN_FLICKR8K" in missing.remedy
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "captions.txt").write_text("image,caption\n")
    monkeypatch.setenv("CAPGEN_FLICKR8K", str(folder))
    found = _named("data: flickr8k")
    assert found.ok and str(folder) in found.value


def test_resnet_weights_are_looked_for_in_torchs_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert _named("encoder: resnet50").ok is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "resnet50-11ad3fa6.pth").touch()
    assert _named("encoder: resnet50").ok is True


def test_hubs_are_asked_at_once_and_a_silent_one_costs_no_more_than_the_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def head(url: str, **kwargs: object) -> SimpleNamespace:
        if "silent" in url:
            time.sleep(5)
        if "dead" in url:
            raise requests.ConnectionError(url)
        return SimpleNamespace(status_code=503 if "ill" in url else 403)

    monkeypatch.setattr(requests, "head", head)
    start = time.monotonic()
    answers = doctor.reachable(["silent.org", "dead.org", "ill.org", "refuses.org"], timeout=0.5)
    assert time.monotonic() - start < 3
    assert answers == {
        "silent.org": False,
        "dead.org": False,
        "ill.org": False,
        "refuses.org": True,
    }


def test_unreachable_hubs_say_what_to_do_offline() -> None:
    for host in doctor.HUBS:
        finding = _named(f"network: {host}")
        assert finding.ok is None and finding.remedy


def test_a_kaggle_key_is_found_and_never_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert _named("Kaggle key").ok is None
    monkeypatch.setenv("KAGGLE_USERNAME", "somebody")
    monkeypatch.setenv("KAGGLE_KEY", "very-secret")
    findings = doctor.examine()
    assert next(f for f in findings if f.name == "Kaggle key").ok is True
    assert "very-secret" not in doctor.report(findings)


def test_a_failing_check_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode() -> list[Finding]:
        raise OSError("the disk is gone")

    monkeypatch.setattr(doctor, "_disk", explode)
    names = {f.name: f for f in doctor.examine()}
    assert any("the disk is gone" in f.value for f in names.values())
    assert "Kaggle key" in names
