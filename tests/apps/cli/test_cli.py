"""The command line: help, errors with code 2 and no traceback, captions, scores, Ctrl-C."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import PHOTOS, ROOT, capgen, need, save_tiny_bundle
from safetensors import safe_open

from capgen_utils import __version__
from capgen_utils.apps.cli import main as cli
from capgen_utils.common.files import CapGenError
from capgen_utils.evaluation.metrics import load_captions, load_references, score

COMMANDS = (
    "doctor",
    "download",
    "pretrain",
    "train",
    "evaluate",
    "attention",
    "score",
    "leaderboard",
    "caption",
) + (
    "info",
    "course",
    "completion",
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "bundle"
    save_tiny_bundle(folder)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run a command in this process; returns its code, output and errors."""
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0 and f"capgen {command}" in out
    options = [line.split()[0] for line in out.splitlines() if line.startswith("  --")]
    assert len(options) == len(set(options))


def test_help_lists_the_commands_and_nothing_else_is_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(command in out for command in COMMANDS)
    assert run(capsys, "--version")[1].strip() == f"capgen {__version__}"
    for wrong in ([], ["conjure"]):
        code, _, err = run(capsys, *wrong)
        assert code == 2 and "usage" in err


def test_the_installed_command_is_the_module() -> None:
    done = capgen("--version")
    assert done.returncode == 0 and done.stdout.strip() == f"capgen {__version__}"
    script = Path(sys.executable).parent / "capgen"
    if script.exists():
        assert (
            subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout
            == done.stdout
        )


def caption_files(folder: Path) -> dict[str, Path]:
    """Write small files of captions and return them by name."""
    words = ["dog", "cat", "man", "boat", "tree"]
    said = {f"{i}.jpg": f"a {word} beside the {words[i - 1]}" for i, word in enumerate(words)}
    written = {
        name: [f"a {word} stands near a {words[i - 1]} {k}" for k in range(5)]
        for i, (name, word) in enumerate(zip(said, words, strict=True))
    }
    values: dict[str, Any] = {
        "SAID": said,
        "BETTER": {name: captions[0] for name, captions in written.items()},
        "COCO": [{"image_id": name, "caption": caption} for name, caption in said.items()],
        "WRITTEN": written,
        "OTHERS": written | {"other.jpg": ["a dog"]},
        "EMPTY": {},
        "SILENT": said | {"0.jpg": ""},
    }
    folder.mkdir()
    for name, value in values.items():
        (folder / f"{name.lower()}.json").write_text(json.dumps(value))
    return {name: folder / f"{name.lower()}.json" for name in values}


# --- errors

WRONG: list[tuple[list[str], str]] = [
    (["train", "--preset", "flickr9k"], "flickr8k"),
    (["train", "--preset", "shapes", "--encoder", "resnet51"], "resnet50"),
    (["train", "--preset", "shapes", "--model", "lstm9000"], "transformer"),
    (["train", "--preset", "shapes", "--epochs", "0"], "above zero"),
    (["train", "--preset", "shapes", "--learning-rate", "-1"], "above zero"),
    (["train", "--preset", "shapes", "--limit", "0"], "1 or more"),
    (["train", "--preset", "shapes", "--limit", "-2"], "1 or more"),
    (["train", "--preset", "flickr8k", "--data", "nowhere"], "nowhere"),
    (["train", "--preset", "folder"], "folder"),
    (["train", "--preset", "shapes", "--encoder-weights", "nowhere.pth"], "nowhere.pth"),
    (["pretrain", "--preset", "flickr8k", "--data", "nowhere"], "nowhere"),
    (["download", "flickr9k"], "flickr8k"),
    (["evaluate", "--bundle", "nowhere"], "nowhere"),
    (["evaluate", "--bundle", "BUNDLE", "--dataset", "flickr9k"], "flickr8k"),
    (["evaluate", "--bundle", "BUNDLE", "--split", "validation"], "test"),
    (["evaluate", "--bundle", "BUNDLE", "--beam", "0"], "from 1 to"),
    (["evaluate", "--bundle", "BUNDLE", "--limit", "0", "--dataset", "shapes"], "1 or more"),
    (["evaluate", "--rescore", "nowhere.json"], "nowhere.json"),
    (["evaluate", "--rescore", "SAID"], "does not hold the results"),
    (["score", "nowhere.json", "WRITTEN"], "nowhere.json"),
    (["score", "SAID", "nowhere.json"], "nowhere.json"),
    (["score", "SAID", "OTHERS"], "same images"),
    (["score", "EMPTY", "WRITTEN"], "same images"),
    (["score", "WRITTEN", "WRITTEN"], "is no caption of"),
    (["score", "SAID", "SAID"], "no list of captions"),
    (["score", "SAID", "WRITTEN", "--against", "EMPTY"], "same images"),
    (["score", "SAID", "WRITTEN", "--training", "SAID"], "no list of captions"),
    (["leaderboard", "--results", "nowhere"], "nowhere"),
    (["caption", "nowhere.jpg"], "nowhere.jpg"),
    (["caption", "--bundle", "nowhere", "PHOTO"], "nowhere"),
    (["caption", "--bundle", "BUNDLE", "--device", "abacus", "PHOTO"], "abacus"),
    (["caption", "--bundle", "BUNDLE", "--beam", "0", "PHOTO"], "beam"),
    (["caption", "--bundle", "BUNDLE", "--max-length", "99", "PHOTO"], "from 1 to 15"),
    (["caption", "--bundle", "BUNDLE", "--top-p", "1.5", "PHOTO"], "0.001 to 1"),
    (
        ["caption", "--bundle", "BUNDLE", "--beam", "3", "--temperature", "1", "PHOTO"],
        "one of the two",
    ),
    (["caption", "--bundle", "BUNDLE", "--beam", "4", "--groups", "3", "PHOTO"], "multiple of 3"),
    (["caption", "--bundle", "BUNDLE", "--candidates", "0", "PHOTO"], "1 or more"),
    (["evaluate", "--bundle", "BUNDLE", "--top-k", "-1"], "from 0 to"),
    (["caption", "--bundle", "BUNDLE", "--encoder-weights", "nowhere", "PHOTO"], "nowhere"),
    (["info", "nowhere"], "nowhere"),
    (["course", "--preset", "flickr9k"], "flickr8k"),
]


@pytest.mark.parametrize(
    ("arguments", "said"), WRONG, ids=lambda v: " ".join(v) if isinstance(v, list) else None
)
def test_errors_say_what_to_do_and_end_with_2(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    bundle: Path,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CAPGEN_FLICKR8K", raising=False)
    from capgen_utils.training import pretraining

    monkeypatch.setattr(pretraining, "pretrain_encoder", lambda *a: pytest.fail("began to train"))
    names = {"BUNDLE": str(bundle), "PHOTO": str(PHOTOS / "cat_on_deck.jpg")}
    names |= {name: str(path) for name, path in caption_files(tmp_path / "files").items()}
    code, _, err = run(capsys, *(names.get(a, a) for a in arguments))
    assert code == 2
    last = err[("\n" + err).rindex("\ncapgen: ") :]  # progress bars may stand before it
    assert last.startswith("capgen: ") and "\n  -> " in last and said in last
    assert "Traceback" not in err


def test_errors_of_a_real_process_have_no_traceback(tmp_path: Path) -> None:
    done = capgen("caption", "nowhere.jpg", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("capgen: there is no file or folder nowhere.jpg")
        and "Traceback" not in done.stderr
    )


# --- captions


def test_one_photo_gives_one_line(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    code, out, err = run(capsys, "caption", "--bundle", bundle, PHOTOS / "cat_on_deck.jpg")
    assert code == 0 and err == "" and len(out.splitlines()) == 1 and "cat_on_deck" not in out


def test_a_folder_gives_one_line_per_photo(
    capsys: pytest.CaptureFixture[str], bundle: Path
) -> None:
    code, out, _ = run(capsys, "caption", "--bundle", bundle, PHOTOS)
    names = sorted(p.name for p in PHOTOS.glob("*.jpg"))
    assert code == 0 and [Path(line.split(": ")[0]).name for line in out.splitlines()] == names


def test_json_lines_can_be_read_back(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    photos = sorted(PHOTOS.glob("*.jpg"))[:2]
    code, out, _ = run(capsys, "caption", "--json", "--beam", "3", "--bundle", bundle, *photos)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["image"] for row in rows] == [str(p) for p in photos]
    for row in rows:
        assert row["caption"] == row["candidates"][0]["text"]
        assert all(c["log_probability"] < 0 for c in row["candidates"])


def test_decoding_options_reach_the_captioner(
    capsys: pytest.CaptureFixture[str], bundle: Path
) -> None:
    photo = PHOTOS / "cat_on_deck.jpg"

    def rows(*options: object) -> list[dict[str, Any]]:
        code, out, _ = run(capsys, "caption", "--json", "--bundle", bundle, *options, photo)
        assert code == 0
        return json.loads(out)["candidates"]

    drawn = ("--top-p", 0.8, "--temperature", 1.5, "--candidates", 4)
    assert len(rows(*drawn)) == 4 and rows(*drawn) == rows(*drawn, "--seed", 0)
    assert any(rows(*drawn) != rows(*drawn, "--seed", seed) for seed in (1, 2))
    assert len(rows("--candidates", 1)) == 1 and len(rows("--candidates", 3)) == 3
    assert len(rows("--groups", 2, "--diversity", 9, "--beam", 2)) == 2
    assert (
        len(rows("--beam", 1, "--min-length", 7, "--repetition-penalty", 1.3)[0]["text"].split())
        >= 7
    )
    words = rows("--beam", 1, "--no-repeat-ngram", 1, "--top-k", 0, "--length-penalty", 0.5)[0][
        "text"
    ].split()
    assert len(words) == len(set(words))
    code, out, _ = run(capsys, "caption", "--bundle", bundle, "--candidates", 2, photo)
    assert (
        code == 0
        and len(out.splitlines()) == 3
        and out.splitlines()[1].split(maxsplit=1)[1] == out.splitlines()[0]
    )


def test_a_bad_photo_among_good_ones(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    shutil.copy(PHOTOS / "cat_on_deck.jpg", tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_text("no image")
    code, out, err = run(capsys, "caption", "--bundle", bundle, tmp_path)
    assert code == 1 and len(out.splitlines()) == 1 and "b.jpg" in err and "1 of 2" in err
    assert run(capsys, "caption", "--bundle", bundle, tmp_path / "b.jpg")[0] == 2


def test_a_closed_pipe_is_no_error(bundle: Path) -> None:
    photos = sorted(PHOTOS.glob("*.jpg"))
    command = [
        sys.executable,
        "-m",
        "capgen_utils",
        "caption",
        "--bundle",
        str(bundle),
        *map(str, photos * 3),
    ]
    first = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert first.stdout is not None and first.stderr is not None
    first.stdout.close()
    err = first.stderr.read()
    first.wait(timeout=60)
    assert "Traceback" not in err and "BrokenPipe" not in err


# --- what a bundle holds, and shells


def test_info_describes_a_bundle(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    code, out, _ = run(capsys, "info", bundle, "--json")
    facts, config = json.loads(out), json.loads((bundle / "config.json").read_text())
    assert (
        code == 0
        and facts["model"] == config["model"]
        and facts["hyperparameters"] == config["architecture"]
    )
    with safe_open(bundle / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
        assert facts["parameters"] == sum(weights.get_tensor(name).numel() for name in names)
    assert facts["encoder"]["name"] == config["encoder"]["name"] and facts["encoder"]["included"]
    assert (
        facts["vocabulary"]["tokens"] == 16
        and facts["decoding"]["beam"] == 2
        and facts["dev"] is None
    )
    assert facts["files"] == {
        p.relative_to(bundle).as_posix(): p.stat().st_size for p in bundle.rglob("*.*")
    }
    code, out, _ = run(capsys, "info", bundle)
    assert code == 0 and f"{facts['parameters']:,} parameters" in out and "dev scores" not in out


def test_info_describes_the_training(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundle, tmp_path / "b")
    config = json.loads((bundle / "config.json").read_text())
    config |= {
        "dev": {"BLEU-4": 18.43751, "protocol": "greedy"},
        "training_run": {"epochs": 15},
        "dataset": "\x1b[2Jx",
    }
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    code, out, _ = run(capsys, "info", tmp_path / "b")
    assert (
        code == 0
        and "BLEU-4 18.44" in out
        and "epochs 15" in out
        and "greedy" in out
        and "\x1b" not in out
    )
    for odd in ([1], "text", None, 3):  # what is not needed to caption may be anything
        (tmp_path / "b" / "config.json").write_text(
            json.dumps(config | {"dev": odd, "training_run": odd})
        )
        assert run(capsys, "info", tmp_path / "b")[0] == 0
    (tmp_path / "b" / "model.safetensors").write_bytes(b"damaged")
    code, _, err = run(capsys, "info", tmp_path / "b")
    assert code == 2 and "model.safetensors" in err


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_every_command(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    code, out, _ = run(capsys, "completion", shell)
    assert code == 0 and all(command in out for command in COMMANDS) and "length-penalty" in out
    assert run(capsys, "completion", "abacus")[0] == 2


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("capgen inf", "info"),
        ("capgen caption --form", "--format"),
        ("capgen caption --format js", "jsonl"),
        ("capgen info fol", "folder"),
        ("capgen caption --output fi", "file.txt"),
    ],
)
def test_bash_completes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, typed: str, offered: str
) -> None:
    need("bash", shutil.which("bash"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").touch()
    script = tmp_path / "script.sh"
    words = typed.split()
    asked = f"\nCOMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _shtab_capgen"
    asked += '; echo "${COMPREPLY[@]}"\n'
    script.write_text(run(capsys, "completion", "bash")[1] + asked)
    done = subprocess.run(
        ["bash", "script.sh"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [offered]


# --- scores


def test_scores_of_files_as_json_and_as_text(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    files = caption_files(tmp_path / "files")
    code, out, err = run(capsys, "score", files["COCO"], files["WRITTEN"], "--json")
    found = json.loads(out)
    assert (
        code == 0 and err == "" and all(isinstance(value, int | float) for value in found.values())
    )
    said, written = load_captions(files["SAID"]), load_references(files["WRITTEN"])
    for name, value in score(said, written).items():
        assert found[name] == pytest.approx(value)
    code, out, _ = run(capsys, "score", files["SAID"], files["WRITTEN"], "--intervals")
    (line,) = [line for line in out.splitlines() if line.split()[:1] == ["CIDEr-D"]]
    low, high = (float(end) for end in line.split("[")[1].rstrip("]").split(","))
    assert (
        code == 0 and low - 0.01 <= found["CIDEr-D"] <= high + 0.01 and "BLEU: corpus level" in out
    )


def test_scores_with_intervals_and_against_another_system(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    files = caption_files(tmp_path / "files")
    asked = ("score", files["BETTER"], files["WRITTEN"], "--against", files["SAID"])
    code, out, _ = run(capsys, *asked, "--json", "--intervals")
    found = json.loads(out)["BLEU-1"]
    assert (
        code == 0
        and found["low"] <= found["value"] <= found["high"]
        and found["ahead"]["wins"] == 1
    )
    assert "ahead of" in run(capsys, *asked)[1]


def test_a_wrong_protocol_is_named_beside_the_scores(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    files = caption_files(tmp_path / "files")
    code, out, err = run(
        capsys, "score", files["SILENT"], files["WRITTEN"], "--training", files["WRITTEN"], "--json"
    )
    assert code == 0 and "copied" in json.loads(out)
    assert "WARNING: empty captions: 1 of 5" in err and "WARNING: training images: 5 of 5" in err


def test_the_leaderboard_is_printed_and_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for path in (ROOT / "results").glob("shapes_*.json"):
        shutil.copy(path, tmp_path)
    code, out, _ = run(capsys, "leaderboard", "--results", tmp_path)
    assert code == 0 and "`transformer`" in out and "nearest neighbour" in out
    assert (tmp_path / "leaderboard.md").read_text() in out


# --- stopped


def test_ctrl_c_says_how_to_continue(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_doctor", stop)
    code, _, err = run(capsys, "doctor")
    assert code == 130 and "to continue" in err


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_in_a_real_process_has_no_traceback(tmp_path: Path) -> None:
    script = "import signal, sys, time; from capgen_utils.apps.cli import main as cli\n"
    # A background job starts with SIGINT ignored.
    script += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += "def wait(options):\n    print('now', flush=True)\n    time.sleep(60)\n"
    script += "cli.run_doctor = wait\nsys.exit(cli.main(['doctor']))"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    assert process.stdout is not None and process.stdout.readline().strip() == "now"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err and "to continue" in err


def test_other_errors_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(options: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "run_doctor", bug)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_a_capgen_error_is_two_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(options: Any) -> None:
        raise CapGenError("the cup is empty", "fill it")

    monkeypatch.setattr(cli, "run_doctor", fail)
    assert run(capsys, "doctor") == (2, "", "capgen: the cup is empty\n  -> fill it\n")
