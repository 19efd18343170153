"""Bulk captions: growing files, resumed runs, hostile names and files, bounded memory."""

import csv
import io
import json
import os
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
from helpers import combinations, run_and_kill, run_script, save_tiny_bundle, two_tone

from capgen_utils import captioner as captioning
from capgen_utils.apps.cli import bulk
from capgen_utils.apps.cli import main as cli
from capgen_utils.apps.cli.bulk import (
    CaptionFile,
    FailureFile,
    Style,
    caption_batches,
    read_paths,
    settings_of,
    write_batch,
)
from capgen_utils.captioner import Captioner
from capgen_utils.common.files import CapGenError
from capgen_utils.decoding.captions import Candidate, Caption

JSONL, CSV = Style("jsonl"), Style("csv", candidates=2)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bulk") / "bundle"
    save_tiny_bundle(folder)
    return folder


@pytest.fixture(scope="module")
def captioner(bundle: Path) -> Captioner:
    return Captioner.from_bundle(bundle, "cpu")


def draw(folder: Path, names: list[str]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawn in zip(names, combinations(), strict=False):
        two_tone(*drawn).save(folder / name, format="PNG")
    return [folder / name for name in names]


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Ten images, the fifth one damaged; one name needs quoting in a table."""
    found = draw(tmp_path / "photos", [f"{i}.png" for i in range(9)] + ['9, "so"\nsaid.png'])
    found[4].write_bytes(b"damaged")
    return found


def write(
    captioner: Captioner,
    paths: list[Path],
    output: Path,
    style: Style = JSONL,
    resume: bool = False,
    size: int = 3,
) -> list[int]:
    """Caption into a file; returns the number of images in each batch."""
    batches = []
    with CaptionFile(output, style, settings_of(captioner, style, {}), paths, size, resume) as file:
        for batch in caption_batches(captioner, paths, file.held, size):
            write_batch(batch, style, file, FailureFile(None))
            batches.append(len(batch))
    return batches


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["caption", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- runs that were stopped


@pytest.mark.parametrize("style", [JSONL, CSV], ids=lambda s: s.format)
def test_a_file_torn_anywhere_is_completed_to_the_byte(
    captioner: Captioner, paths: list[Path], tmp_path: Path, style: Style
) -> None:
    whole = tmp_path / f"whole.{style.format}"
    assert write(captioner, paths, whole, style) == [3, 3, 3, 1]
    content = whole.read_bytes()
    torn = tmp_path / f"torn.{style.format}"
    shutil.copy(bulk.settings_path(whole), bulk.settings_path(torn))
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in sorted(
        {0, 1, 7, len(content) // 2, *ends, *(end - 1 for end in ends), *(end + 9 for end in ends)}
    ):
        torn.write_bytes(content[:cut])
        batches = write(captioner, paths, torn, style, resume=True)
        assert torn.read_bytes() == content, cut
        assert cut < ends[-3] or sum(batches) <= 5, (
            "what is there is not done again, but for the last batch"
        )


def test_a_killed_run_resumes(bundle: Path, tmp_path: Path) -> None:
    """All runs are processes: another number of threads may change the last digit."""
    names = draw(tmp_path / "photos", [f"{i:02d}.png" for i in range(14)])
    shutil.copytree(bundle, tmp_path / "bundle")
    names[5].write_bytes(b"")
    run_and_kill("bulk", tmp_path, count=2)
    killed = (tmp_path / "out.jsonl").read_bytes()
    assert run_script("bulk", tmp_path, output="whole.jsonl") == "1", (
        "one image of 14 cannot be read"
    )
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert 7 <= killed.count(b"\n") < 13 and whole.startswith(killed) and whole.count(b"\n") == 13
    with open(tmp_path / "out.jsonl", "ab") as stream:
        stream.write(b'{"image": "')  # as a kill within a line leaves it
    assert run_script("bulk", tmp_path, resume=True) == "1"
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_fp32_features_are_part_of_the_settings(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    bundle: Path,
    tmp_path: Path,
    paths: list[Path],
) -> None:
    monkeypatch.setattr("capgen_utils.common.device.cpu_has_bf16", lambda: True)
    shutil.copytree(bundle, tmp_path / "bf16")
    info = json.loads((bundle / "config.json").read_text()) | {"extraction_dtype": "bfloat16"}
    (tmp_path / "bf16" / "config.json").write_text(json.dumps(info))
    asked = (*paths[:3], "--format", "jsonl", "--bundle")
    exact = run(capsys, *asked, bundle)
    assert (
        exact
        == run(capsys, *asked, tmp_path / "bf16", "--fp32")
        != run(capsys, *asked, tmp_path / "bf16")
    )
    output = ("--output", tmp_path / "out.jsonl")
    assert run(capsys, *asked, tmp_path / "bf16", "--fp32", *output)[0] == 0
    code, _, err = run(capsys, *asked, tmp_path / "bf16", *output, "--resume")
    assert code == 2 and "settings" in err, "other features, other captions"


def test_a_failure_is_named_and_counted(
    capsys: pytest.CaptureFixture[str], bundle: Path, paths: list[Path]
) -> None:
    code, out, err = run(
        capsys, *paths[3:6], "--bundle", bundle, "--output", paths[0].parent / "out.jsonl"
    )
    assert code == 1 and out == "" and "4.png" in err and "1 of 3" in err


def test_new_and_repaired_images_are_added(
    captioner: Captioner, paths: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    write(captioner, paths[:7], output)
    shutil.copy(paths[0], paths[4])
    write(captioner, paths, output, resume=True)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(row["image"] for row in rows) == sorted(map(str, paths))
    for row in rows:
        assert row["caption"] == captioner.caption(Path(row["image"]))[0].text


def test_a_run_with_other_settings_is_not_resumed(
    capsys: pytest.CaptureFixture[str], bundle: Path, paths: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "out.csv"
    asked = [*paths[:3], "--output", output, "--bundle", bundle]
    assert run(capsys, *asked)[0] == 0
    before = output.read_bytes()
    save_tiny_bundle(tmp_path / "other", d_model=48)
    for changed, named in (
        ([*asked, "--resume", "--beam", 1], "(decoding)"),
        ([*asked, "--resume", "--candidates", 2], "candidates"),
        ([*asked, "--resume", "--json"], "format"),
        ([*asked[:-1], tmp_path / "other", "--resume"], "(bundle)"),
        (asked, "exists already"),
    ):
        code, _, err = run(capsys, *changed)
        assert code == 2 and named in err and "\n  -> " in err and output.read_bytes() == before
    assert run(capsys, *asked, "--resume")[0] == 0 and output.read_bytes() == before
    bulk.settings_path(output).unlink()
    code, _, err = run(capsys, *asked, "--resume")
    assert code == 2 and "not known" in err and output.read_bytes() == before


@pytest.mark.parametrize("style", [JSONL, CSV], ids=lambda s: s.format)
def test_a_file_that_holds_something_else_is_left_alone(
    captioner: Captioner, paths: list[Path], tmp_path: Path, style: Style
) -> None:
    output = tmp_path / "out"
    write(captioner, paths[:3], output, style)
    content = output.read_bytes()
    for wrong in (
        b"hello\n" + content,
        b"[1]\n" + content,
        b"\xff\xfe\n" + content,
        b'{"image": 3}\n' + content,
    ):
        output.write_bytes(wrong)
        with pytest.raises(CapGenError, match="out"):
            write(captioner, paths[:3], output, style, resume=True)
        assert output.read_bytes() == wrong
    output.unlink()
    output.mkdir()
    with pytest.raises(CapGenError, match="exists already"):
        write(captioner, paths[:3], output, style, resume=True)


def test_ctrl_c_says_how_to_resume(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    bundle: Path,
    paths: list[Path],
    tmp_path: Path,
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bulk, "write_batch", stop)
    code, _, err = run(capsys, *paths, "--bundle", bundle, "--output", tmp_path / "out.jsonl")
    assert code == 130 and "add --resume" in err
    code, _, err = run(capsys, *paths, "--bundle", bundle)
    assert code == 130 and "no file to continue" in err


# --- memory


class Alive:
    """Counts live objects, and the most that were ever alive."""

    def __init__(self) -> None:
        self.now = self.most = self.ever = 0

    def count(self, thing: Any) -> Any:
        weakref.finalize(thing, self._gone)
        self.now, self.ever = self.now + 1, self.ever + 1
        self.most = max(self.most, self.now)
        return thing

    def _gone(self) -> None:
        self.now -= 1


def test_images_and_captions_are_freed(
    captioner: Captioner, paths: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    images, captions = Alive(), Alive()
    opened, said = captioning.open_image, captioning.caption_of
    monkeypatch.setattr(captioning, "open_image", lambda source: images.count(opened(source)))
    monkeypatch.setattr(captioning, "caption_of", lambda *found: captions.count(said(*found)))
    many = [path for path in paths if path != paths[4]] * 6
    read = 0
    with CaptionFile(tmp_path / "out.csv", CSV, {}, many, 4) as file:
        for batch in caption_batches(captioner, many, batch_size=4):
            read += len(batch)
            assert images.ever == captions.ever == read, (
                "no batch begins before the one before it is written"
            )
            write_batch(batch, CSV, file, FailureFile(None))
    assert read == len(many) == 54
    assert images.most <= 2 and captions.most <= 8, (
        "one image that is shrunk and the next, one batch and the next"
    )


# --- names and files that do harm


def test_a_folder_of_odd_names_and_bad_files(
    capsys: pytest.CaptureFixture[str], bundle: Path, captioner: Captioner, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    good = draw(
        folder,
        [
            "a.png",
            "no suffix",
            "b,c.png",
            'say "cheese".png',
            "two\nlines.png",
            "\x1b[2J.png",
            "=1+1.png",
        ],
    )
    good += draw(folder / "sub" / "deep.jpg", ["d.JPG"])
    odd = Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.png"))
    try:
        shutil.copy(good[0], odd)
        good.append(odd)
    except OSError:
        pass  # this file system has no such names
    draw(folder / ".hidden", ["x.png"])
    content = good[0].read_bytes()
    bad = {
        "empty.jpg": b"",
        "text.png": b"no image",
        "torn.png": content[: len(content) // 2],
        "page.gif": b"<html>",
    }
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    (folder / "gone.jpg").symlink_to(folder / "nowhere")
    (folder / "round").symlink_to(folder)
    (folder / "notes.txt").write_text("not even called an image")
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.jpg")
        bad["pipe.jpg"] = b""
    bad["gone.jpg"] = b""
    output, failures = tmp_path / "new" / "out.csv", tmp_path / "new" / "failures.jsonl"
    asked = (
        folder,
        "--bundle",
        bundle,
        "--batch-size",
        3,
        "--output",
        output,
        "--failures",
        failures,
    )
    code, out, err = run(capsys, *asked)
    assert code == 1 and out == "" and "Traceback" not in err and "\x1b" not in err
    assert f"{len(bad)} of {len(bad) + len(good)} images" in err and err.count("\n  -> ") == len(
        bad
    )
    with open(output, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert sorted(row["image"] for row in rows) == sorted(map(bulk.shown, good))
    said = {
        bulk.shown(path): caption.text
        for path, caption in zip(good, captioner.caption(good), strict=True)
    }
    assert {row["image"]: row["caption"] for row in rows} == said and len(set(said.values())) > 2
    assert all(row["rank"] == "1" and float(row["log_probability"]) < 0 for row in rows)
    listed = [json.loads(line) for line in failures.read_text(encoding="utf-8").splitlines()]
    assert {Path(row["image"]).name for row in listed} == set(bad)
    assert all(Path(row["image"]).name in row["problem"] and row["remedy"] for row in listed)
    before = output.read_bytes()
    assert run(capsys, *asked, "--resume")[0] == 1
    assert output.read_bytes() == before and len(failures.read_text().splitlines()) == len(bad)


def test_each_caption_of_plain_text_is_one_line(captioner: Captioner, paths: list[Path]) -> None:
    out = io.StringIO()
    for batch in caption_batches(captioner, paths):
        write_batch(batch, Style(), out, FailureFile(None))
    assert len(out.getvalue().splitlines()) == 9 and r"\nsaid.png: " in out.getvalue()


def test_bad_images_do_not_split_their_batch(
    captioner: Captioner, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    real = captioner._caption_batch
    monkeypatch.setattr(
        captioner,
        "_caption_batch",
        lambda images, *a: sizes.append(len(images)) or real(images, *a),
    )
    ((*_, last),) = caption_batches(captioner, paths)
    assert sizes == [10, 9] and last[0] == paths[-1] and isinstance(last[1], Caption)


def test_no_file_is_overwritten_by_mistake(
    capsys: pytest.CaptureFixture[str], bundle: Path, paths: list[Path], tmp_path: Path
) -> None:
    before = paths[0].read_bytes()
    for wrong in (
        ["--failures", paths[0]],
        ["--output", paths[0]],
        ["--output", paths[0], "--resume"],
        ["--output", tmp_path / "x.csv", "--failures", tmp_path / "x.csv"],
        ["--output", tmp_path / "x.txt", "--resume"],
        ["--resume"],
        ["--batch-size", 0],
        ["--failures", tmp_path],
    ):
        code, out, err = run(capsys, *paths[:2], "--bundle", bundle, *wrong)
        assert code == 2 and out == "" and "\n  -> " in err and paths[0].read_bytes() == before
    assert not (tmp_path / "x.csv").exists()


def test_impossible_options_leave_no_file(
    capsys: pytest.CaptureFixture[str], bundle: Path, paths: list[Path], tmp_path: Path
) -> None:
    assert (
        run(capsys, *paths, "--bundle", bundle, "--beam", 0, "--output", tmp_path / "out.jsonl")[0]
        == 2
    )
    assert not list(tmp_path.glob("out*"))


# --- lists, formats and exit codes


def test_a_list_has_lines_or_is_separated_by_nul() -> None:
    assert read_paths(b"a b.jpg\r\n\nc.jpg") == [Path("a b.jpg"), Path("c.jpg")]
    assert read_paths(b"a\nb.jpg\0c.jpg\0") == [Path("a\nb.jpg"), Path("c.jpg")]
    assert os.fsencode(read_paths(b"\xff.jpg")[0]) == b"\xff.jpg" and read_paths(b"") == []


def test_paths_on_stdin(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    bundle: Path,
    paths: list[Path],
) -> None:
    def piped(data: bytes, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        return run(capsys, "-", *arguments, "--bundle", bundle)

    listed = f"{paths[0]}\n{paths[1]}\n{paths[0]}\n".encode()
    code, out, err = piped(listed, "--json")
    assert (
        code == 0
        and err == ""
        and [json.loads(row)["image"] for row in out.splitlines()] == [*map(str, paths[:2])]
    )
    code, out, err = piped(listed + b"nowhere.png\n", "--format", "csv")
    assert code == 1 and "nowhere.png" in err and "1 of 3" in err
    assert [row["image"] for row in csv.DictReader(io.StringIO(out, newline=""))] == [
        *map(str, paths[:2])
    ]
    code, out, _ = piped("\0".join(map(str, paths)).encode(), paths[0].parent)
    assert code == 1 and len(out.splitlines()) == 9, "a path that is named twice is one image"
    code, out, err = piped(b"\n")
    assert code == 2 and "no image was named" in err
    assert piped(b"nowhere.png\n")[0] == 2


def test_the_format_follows_the_name_of_the_file(
    capsys: pytest.CaptureFixture[str], bundle: Path, paths: list[Path], tmp_path: Path
) -> None:
    asked = (paths[0], paths[1], "--bundle", bundle, "--output")
    for name in ("a.jsonl", "a.CSV", "a.txt"):
        assert run(capsys, *asked, tmp_path / name)[:2] == (0, "")
    said = [json.loads(line)["caption"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    with open(tmp_path / "a.CSV", newline="") as stream:
        assert [row["caption"] for row in csv.DictReader(stream)] == said
    assert [line.split(": ")[-1] for line in (tmp_path / "a.txt").read_text().splitlines()] == said
    assert not bulk.settings_path(tmp_path / "a.txt").exists()
    assert run(capsys, *asked, tmp_path / "b.txt", "--json")[0] == 0
    assert (tmp_path / "b.txt").read_bytes() == (tmp_path / "a.jsonl").read_bytes()


def test_progress_is_on_stderr_and_counts_existing_captions(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    bundle: Path,
    paths: list[Path],
    tmp_path: Path,
) -> None:
    asked = (*paths, "--bundle", bundle, "--batch-size", 4, "--output", tmp_path / "out.jsonl")
    assert "10/10" not in run(capsys, *asked)[2], "no terminal, few images: no bar"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    code, out, err = run(capsys, *asked, "--resume")
    assert (
        code == 1
        and out == ""
        and "10/10" in err
        and "7/10" in err
        and "4.png is not an image" in err
    )


def test_reranked_captions_are_written_with_their_clip_score() -> None:
    found = tuple(
        Candidate(text, -1.23456, -1.0, 0.5, score)
        for text, score in (("a dog", 0.31239), ("a cat", 0.2))
    )
    caption = Caption("a dog", -1.23456, ("a", "dog"), True, found)
    style = Style("csv", candidates=5, reranked=True)
    rows = list(
        csv.DictReader(io.StringIO(style.header + style.record(Path("a.jpg"), caption), newline=""))
    )
    shown = [(row["caption"], row["rank"], row["clip_score"]) for row in rows]
    assert shown == [("a dog", "1", "0.3124"), ("a cat", "2", "0.2")]
    assert rows[0]["temperature"] == "0.5" and rows[0]["log_probability"] == "-1.2346"
    assert (
        json.loads(Style("jsonl").record(Path("a.jpg"), caption))["candidates"][0]["clip_score"]
        == 0.3124
    )
    assert "0.312  a dog" in Style("text", candidates=1).record(Path("a.jpg"), caption)
