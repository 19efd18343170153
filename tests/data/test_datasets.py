"""Every layout becomes one manifest; hostile, damaged and half-empty folders are counted or
refused."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from capgen_utils.common.files import CapGenError
from capgen_utils.data import layouts, reading, shapes
from capgen_utils.data.datasets import DATASETS, download_dataset, load_dataset
from capgen_utils.data.manifest import SPLITS, Item, Manifest

OFFICIAL = layouts.official_split()
TRAIN, DEV, TEST = ([name for name, s in OFFICIAL.items() if s == split][:6] for split in SPLITS)


@pytest.fixture(autouse=True)
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CAPGEN_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("CAPGEN_FLICKR8K", raising=False)
    return tmp_path / "data"


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"not looked into")


def write(path: Path, *lines: str, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding=encoding)


def flickr8k_miniature(root: Path) -> Path:
    names = [*TRAIN, *DEV[:2], *TEST[:2]]
    touch(root / "Images", *names)
    write(
        root / "captions.txt",
        "image,caption",
        *(f"{n},A dog number {k} runs ." for n in names for k in range(5)),
    )
    return root


def counts(manifest: Manifest) -> dict[str, int]:
    return dict(Counter(item.split for item in manifest.items))


def by_image(manifest: Manifest) -> dict[str, Item]:
    return {item.image: item for item in manifest.items}


# --- Flickr8k


def test_the_official_lists_ship() -> None:
    assert Counter(OFFICIAL.values()) == {"train": 6000, "dev": 1000, "test": 1000}
    assert all(
        reading.safe_name(name, Path("list")) == name and name.endswith(".jpg") for name in OFFICIAL
    )


@pytest.mark.flickr8k
def test_real_flickr8k(flickr8k: Path) -> None:
    manifest = load_dataset("flickr8k", flickr8k)
    assert counts(manifest) == {"train": 6000, "dev": 1000, "test": 1000}
    assert manifest.report[reading.NO_SPLIT] == 91
    assert manifest.path(manifest.items[0]).is_file()
    assert all(len(item.captions) == 5 for item in manifest.items)


def test_flickr8k_by_kaggle(tmp_path: Path) -> None:
    manifest = load_dataset("flickr8k", flickr8k_miniature(tmp_path / "f"))
    assert counts(manifest) == {"train": 6, "dev": 2, "test": 2}
    assert manifest.report == {} and manifest.name == "flickr8k"
    assert all(manifest.path(item).is_file() for item in manifest.items)
    assert [item.split for item in manifest.items] == ["train"] * 6 + ["dev"] * 2 + ["test"] * 2
    assert counts(manifest.limit(1)) == counts(load_dataset("flickr8k", tmp_path / "f", limit=1))


@pytest.mark.parametrize("images", layouts.FLICKR8K_IMAGES)
def test_flickr8k_in_the_original_layout_nested(tmp_path: Path, images: str) -> None:
    touch(tmp_path / "Flickr8k_Dataset" / images, TRAIN[0], DEV[0])
    touch(tmp_path / "__MACOSX" / images, "._" + TRAIN[0])
    write(
        tmp_path / "Flickr8k_text" / "Flickr8k.token.txt",
        f"{TRAIN[0]}#0\tA dog , running .",
        f"{TRAIN[0]}#1\tA dog .",
        f"{DEV[0]}#0\tA cat sleeps .",
        f"{TRAIN[1]}.1#0\tNo such image here .",
    )
    manifest = load_dataset("flickr8k", tmp_path)
    assert by_image(manifest)[TRAIN[0]].captions == ("A dog , running .", "A dog .")
    assert counts(manifest) == {"train": 1, "dev": 1}
    assert manifest.report == {reading.MISSING_IMAGES: 1, reading.SHORT_CAPTIONS: 1}


def test_flickr8k_commas_and_quotes(tmp_path: Path) -> None:
    touch(tmp_path / "Images", *TRAIN)
    write(
        tmp_path / "captions.txt",
        "\ufeffimage,caption",
        f'{TRAIN[0]},"A dog, a cat and "" a sign "" ."',
        f"{TRAIN[0]},A dog, a cat, unquoted .",
        f'{TRAIN[1]},"A stray quotation mark here .',
        f'{TRAIN[2]},"Stop" says the sign .',
        f"{TRAIN[3]},Ein Hund läuft über die Straße .\r",
    )
    items = by_image(load_dataset("flickr8k", tmp_path))
    assert items[TRAIN[0]].captions == ('A dog, a cat and " a sign " .', "A dog, a cat, unquoted .")
    assert items[TRAIN[1]].captions == ('"A stray quotation mark here .',)
    assert items[TRAIN[2]].captions == ('"Stop" says the sign .',)
    assert items[TRAIN[3]].captions == ("Ein Hund läuft über die Straße .",)


def test_flickr8k_dirt_is_counted(tmp_path: Path) -> None:
    touch(tmp_path / "Images", *TRAIN[:4], "in_no_list.jpg", "Thumbs.db", ".hidden.jpg")
    write(
        tmp_path / "captions.txt",
        "image,caption",
        f"{TRAIN[0]},A dog runs .",
        f"{TRAIN[0]},A dog runs .",
        f"{TRAIN[0]},   ",
        f"{TRAIN[1]},A",
        f"{TRAIN[2]},",
        "",
        "2258277193_586949ec62.jpg.1,A man on a horse .",
        "2258277193_586949ec62.jpg.1,A horse .",
        "in_no_list.jpg,A cat sleeps .",
    )
    manifest = load_dataset("flickr8k", tmp_path)
    assert [item.image for item in manifest.items] == sorted(TRAIN[:2])
    assert by_image(manifest)[TRAIN[0]].captions == ("A dog runs .", "A dog runs .")
    assert manifest.report == {
        reading.EMPTY_CAPTIONS: 2,
        reading.SHORT_CAPTIONS: 1,
        reading.MISSING_IMAGES: 2,
        reading.NO_SPLIT: 1,
        reading.NO_CAPTIONS: 2,
    }


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "a/../../b.jpg",
        "C:\\x.jpg",
        "..\\x.jpg",
        "",
        "a\0b.jpg",
        ".",
    ],
)
def test_hostile_names_are_refused_everywhere(tmp_path: Path, name: str) -> None:
    touch(tmp_path / "Images", TRAIN[0])
    write(tmp_path / "captions.txt", "image,caption", f"{name},A dog runs .")
    with pytest.raises(CapGenError, match="not a file name inside") as error:
        load_dataset("flickr8k", tmp_path)
    assert "captions.txt" in error.value.problem
    write(tmp_path / "captions.csv", "image,caption", f'"{name}",A dog runs .')
    with pytest.raises(CapGenError, match="not a file name inside"):
        load_dataset("folder", tmp_path)
    image = {"filename": name, "filepath": "", "split": "train", "sentences": [{"raw": "A dog ."}]}
    write(tmp_path / "dataset_flickr30k.json", json.dumps({"images": [image]}))
    with pytest.raises(CapGenError, match="not a file name inside"):
        load_dataset("flickr30k", tmp_path)


@pytest.mark.parametrize("missing", ["captions.txt", "Images"])
def test_flickr8k_without_a_part_is_refused(tmp_path: Path, missing: str) -> None:
    root = flickr8k_miniature(tmp_path / "f")
    (root / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(
        CapGenError, match=missing if missing == "captions.txt" else "folder of images"
    ):
        load_dataset("flickr8k", root)


def test_nothing_left_is_an_error_with_counts(tmp_path: Path) -> None:
    touch(tmp_path / "Images", "other.jpg")
    write(tmp_path / "captions.txt", "image,caption", f"{TRAIN[0]},A dog runs .")
    with pytest.raises(CapGenError, match=f"{reading.MISSING_IMAGES}: 1"):
        load_dataset("flickr8k", tmp_path)


def test_captions_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "Images", TRAIN[0])
    (tmp_path / "captions.txt").write_bytes(
        b"image,caption\n" + TRAIN[0].encode() + b",Stra\xdfe .\n"
    )
    with pytest.raises(CapGenError, match="UTF-8"):
        load_dataset("flickr8k", tmp_path)


# --- Flickr30k and COCO


def karpathy(name: str, split: str, **more: str) -> dict[str, object]:
    return {
        "filename": name,
        "split": split,
        "sentences": [{"raw": f"A dog in {name} ."}] * 5,
        **more,
    }


def test_flickr30k_by_karpathy(tmp_path: Path) -> None:
    touch(tmp_path / "flickr30k-images", "1.jpg", "2.jpg", "3.jpg", "4.jpg")
    images = [
        karpathy("1.jpg", "train"),
        karpathy("2.jpg", "val"),
        karpathy("3.jpg", "test"),
        karpathy("9.jpg", "test"),
    ]
    write(tmp_path / "dataset_flickr30k.json", json.dumps({"images": images}))
    manifest = load_dataset("flickr30k", tmp_path)
    assert {i.image: i.split for i in manifest.items} == {
        "1.jpg": "train",
        "2.jpg": "dev",
        "3.jpg": "test",
    }
    assert manifest.report == {reading.MISSING_IMAGES: 5, reading.NO_CAPTIONS: 1}


def test_flickr30k_by_results_csv_with_its_broken_row(tmp_path: Path) -> None:
    names = [f"{n}.jpg" for n in range(20)]
    touch(tmp_path / "flickr30k_images" / "flickr30k_images", *names)
    rows = [f"{n}| {k}| A dog , number {k} | runs ." for n in names for k in range(4)]
    rows += [f"{names[0]}| 4   A dog runs across the grass ."] + [
        f"{n}| 4| A dog ." for n in names[1:]
    ]
    path = tmp_path / "flickr30k_images" / "results.csv"
    write(path, "image_name| comment_number| comment", *rows)
    manifest = load_dataset("flickr30k", tmp_path)
    assert counts(manifest) == {"train": 16, "dev": 2, "test": 2}
    assert by_image(manifest)["0.jpg"].captions[4] == "A dog runs across the grass ."
    assert by_image(manifest)["0.jpg"].captions[0] == "A dog , number 0 | runs ."
    write(path, "image_name| comment_number| comment", *reversed(rows))
    assert {i.image: i.split for i in load_dataset("flickr30k", tmp_path).items} == {
        i.image: i.split for i in manifest.items
    }, "the split depends on the order of rows"
    write(path, "image_name| comment_number| comment", "0.jpg; 0; A dog .", "1.jpg| what is this")
    with pytest.raises(CapGenError, match="line 3"):
        list(layouts.read_results_csv(path))


def test_flickr30k_by_token_file(tmp_path: Path) -> None:
    names = [f"{n}.jpg" for n in range(10)]
    touch(tmp_path / "flickr30k-images", *names)
    write(
        tmp_path / "results_20130124.token", *(f"{n}#{k}\tA dog ." for n in names for k in range(5))
    )
    assert counts(load_dataset("flickr30k", tmp_path)) == {"train": 8, "dev": 1, "test": 1}


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"images": {}}',
        '{"images": [1]}',
        '{"images": [{"filename": 5}]}',
        '{"images": [{"filename": "1.jpg", "split": "train"}]}',
        '{"images": [{"filename": "1.jpg", "split": "train", "sentences": ["x"]}]}',
        '{"images": [{"filename": "1.jpg", "split": "train", "sentences": [{"raw": 1}]}]}',
        '{"images": [{"filename": "1.jpg", "split": ["train"], "sentences": []}]}',
        '{"images": []}',
        "[" * 100_000,
    ],
)
def test_damaged_karpathy_files_are_refused(tmp_path: Path, content: str) -> None:
    touch(tmp_path / "flickr30k_images", "1.jpg")
    write(tmp_path / "dataset_flickr30k.json", content)
    with pytest.raises(CapGenError):
        load_dataset("flickr30k", tmp_path)


def test_coco_2014_by_karpathy(tmp_path: Path) -> None:
    touch(tmp_path, "train2014/a.jpg", "val2014/a.jpg", "val2014/b.jpg", "val2014/c.jpg")
    images = [
        karpathy("a.jpg", "train", filepath="train2014"),
        karpathy("a.jpg", "restval", filepath="val2014"),
        karpathy("b.jpg", "val", filepath="val2014"),
        karpathy("c.jpg", "test", filepath="val2014"),
    ]
    write(tmp_path / "annotations" / "dataset_coco.json", json.dumps({"images": images}))
    manifest = load_dataset("coco", tmp_path)
    assert {i.image: i.split for i in manifest.items} == {
        "train2014/a.jpg": "train",
        "val2014/a.jpg": "train",
        "val2014/b.jpg": "dev",
        "val2014/c.jpg": "test",
    }
    assert all(manifest.path(item).is_file() for item in manifest.items)


def coco_annotations(names: list[str]) -> str:
    images = [{"id": k, "file_name": name} for k, name in enumerate(names)]
    captions = [
        {"image_id": k, "caption": f"A dog in {name} .\n"}
        for k, name in enumerate(names)
        for _ in range(2)
    ]
    return json.dumps({"images": images, "annotations": captions})


def test_coco_2017_by_its_annotations(tmp_path: Path) -> None:
    train, val = [f"{n:03d}.jpg" for n in range(20)], ["900.jpg", "901.jpg"]
    touch(tmp_path / "train2017", *train)
    touch(tmp_path / "val2017", *val)
    write(tmp_path / "annotations" / "captions_train2017.json", coco_annotations(train))
    write(tmp_path / "annotations" / "captions_val2017.json", coco_annotations(val))
    manifest = load_dataset("coco", tmp_path)
    assert counts(manifest) == {"train": 18, "dev": 2, "test": 2}
    assert {i.image for i in manifest.split("test").items} == {"val2017/900.jpg", "val2017/901.jpg"}
    assert by_image(manifest)["val2017/900.jpg"].captions == ("A dog in 900.jpg .",) * 2
    bad = {"images": [], "annotations": [{"image_id": 7, "caption": "A dog ."}]}
    write(tmp_path / "annotations" / "captions_val2017.json", json.dumps(bad))
    with pytest.raises(CapGenError, match="the image 7, which is not listed"):
        load_dataset("coco", tmp_path)
    bad = {"images": [{"id": 7, "file_name": 5}], "annotations": []}
    write(tmp_path / "annotations" / "captions_val2017.json", json.dumps(bad))
    with pytest.raises(CapGenError, match="another form"):
        load_dataset("coco", tmp_path)


@pytest.mark.parametrize("name", ["flickr30k", "coco"])
def test_large_data_sets_say_where_to_get_them(
    tmp_path: Path, data_folder: Path, name: str
) -> None:
    for ask in (load_dataset, download_dataset):
        with pytest.raises(CapGenError) as error:
            ask(name)
        assert str(data_folder / name) in error.value.remedy and "https://" in error.value.remedy
    with pytest.raises(CapGenError, match="holds neither"):
        load_dataset(name, tmp_path)
    (data_folder / name).mkdir(parents=True)
    assert download_dataset(name) == data_folder / name


# --- anybody's folder


def test_folder_of_any_format_and_language(tmp_path: Path) -> None:
    names = [
        "a.jpg",
        "b.JPEG",
        "c.png",
        "d.webp",
        "e.bmp",
        "sub/f.gif",
        "g.tif",
        "日本.png",
        "h, i.jpg",
        "k.jpg",
    ]
    touch(tmp_path, *names, "notes.txt", "lonely.png")
    rows = [f'"{n}","犬が走る, {n}"' for n in names] + [
        'a.jpg,"second\nline, of ""a"""',
        "gone.jpg,No image .",
        "k.jpg,",
    ]
    write(tmp_path / "captions.csv", "Image,Caption", *rows, encoding="utf-8-sig")
    manifest = load_dataset("folder", tmp_path)
    assert counts(manifest) == {"train": 8, "dev": 1, "test": 1}
    assert {item.image for item in manifest.items} == set(names)
    assert by_image(manifest)["a.jpg"].captions == ("犬が走る, a.jpg", 'second line, of "a"')
    assert manifest.report == {
        reading.MISSING_IMAGES: 1,
        reading.NO_CAPTIONS: 1,
        reading.EMPTY_CAPTIONS: 1,
    }
    assert load_dataset("folder", tmp_path).items == manifest.items


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_folder_with_a_split_column(tmp_path: Path, delimiter: str) -> None:
    touch(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    table = [
        ("split", "image", "caption"),
        ("train", "a.jpg", "A dog here."),
        ("VAL", "b.jpg", "A cat here."),
    ]
    table += [("test", "c.jpg", "A cow here."), ("test", "c.jpg", "A brown cow.")]
    write(tmp_path / "captions.csv", *(delimiter.join(row) for row in table))
    manifest = load_dataset("folder", tmp_path)
    assert {i.image: i.split for i in manifest.items} == {
        "a.jpg": "train",
        "b.jpg": "dev",
        "c.jpg": "test",
    }


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        (
            ["image,caption,split", "a.jpg,A dog.,train", "a.jpg,A cat.,test"],
            "row 3 puts a.jpg into test",
        ),
        (["image,caption,split", "a.jpg,A dog.,"], "row 2 has the split ''"),
        (["image,caption,split", "a.jpg,A dog.,holdout"], "holdout"),
        (["file,text", "a.jpg,A dog."], "columns file, text"),
        (["image,caption", "a.jpg,A dog, a cat."], "row 2 has 3 columns"),
        (["image,caption", 'a.jpg,"A dog'], "not a CSV table"),
        (["image,caption"], "no captions at all|" + reading.NO_CAPTIONS),
        ([""], "holds no image"),
    ],
)
def test_damaged_tables_are_refused(tmp_path: Path, lines: list[str], match: str) -> None:
    touch(tmp_path, "a.jpg")
    write(tmp_path / "captions.csv", *lines)
    with pytest.raises(CapGenError, match=match):
        load_dataset("folder", tmp_path)


def test_folder_finds_names_composed_otherwise(tmp_path: Path) -> None:
    decomposed = "cafe\u0301.jpg"
    touch(tmp_path, decomposed)
    write(tmp_path / "captions.csv", "image,caption", "caf\u00e9.jpg,A small café .")
    assert [item.image for item in load_dataset("folder", tmp_path).items] == [decomposed]


def test_split_by_chance_is_by_image_stable_and_seeded(tmp_path: Path) -> None:
    names = [f"{n}.jpg" for n in range(100)]
    first = reading.tenths(names)
    assert Counter(first.values()) == {"train": 80, "dev": 10, "test": 10}
    assert reading.tenths(list(reversed(names))) == first
    assert reading.seeded_split(names, 10, 10, seed=1) != first
    assert Counter(reading.tenths(names[:3]).values()) == {"train": 1, "dev": 1, "test": 1}
    assert reading.tenths(names[:2]) == dict.fromkeys(names[:2], "train")


def test_folder_needs_a_folder(tmp_path: Path) -> None:
    for root in (None, tmp_path / "missing"):
        with pytest.raises(CapGenError, match="folder"):
            load_dataset("folder", root)
    with pytest.raises(CapGenError, match=r"captions\.csv"):
        load_dataset("folder", tmp_path)


# --- shapes and the registry


@pytest.fixture
def few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = shapes.generate
    monkeypatch.setattr(shapes, "generate", lambda folder, count, seed: whole(folder, 20, seed))


@pytest.mark.usefixtures("few_shapes")
def test_shapes_are_drawn_once_in_the_data_folder(
    data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = load_dataset("shapes")
    assert counts(manifest) == {"train": 16, "dev": 2, "test": 3} and manifest.report == {}
    assert [p.name for p in data_folder.iterdir()] == [f"shapes-{shapes.version()}"]
    assert {item.image for item in manifest.items} == set(shapes.load_scenes(manifest.root))
    monkeypatch.setattr(shapes, "generate", None)  # a second drawing would fail
    assert load_dataset("shapes").items == manifest.items
    assert download_dataset("shapes") == next(data_folder.iterdir())


@pytest.mark.usefixtures("few_shapes", "data_folder")
def test_what_a_clip_is_trained_on_are_other_scenes() -> None:
    many, few = load_dataset("many_shapes"), load_dataset("shapes")
    assert many.root != few.root
    drawn, judged = (
        set(map(repr, shapes.load_scenes(manifest.root).values())) for manifest in (many, few)
    )
    assert not drawn & judged and not any(scene.novel for scene in train_scenes(many))


def train_scenes(manifest: Manifest) -> list[shapes.Scene]:
    scenes = shapes.load_scenes(manifest.root)
    return [scenes[item.image] for item in manifest.split("train").items]


@pytest.mark.usefixtures("few_shapes")
def test_two_processes_that_draw_at_once_both_succeed(
    data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = data_folder / f"shapes-{shapes.version()}"
    rename = os.rename

    def slower(source: Path, destination: Path) -> None:
        if Path(destination) == target and not target.exists():
            shapes.generate(target, 20, 0)  # the other process gets there first
        rename(source, destination)

    monkeypatch.setattr(os, "rename", slower)
    assert len(load_dataset("shapes")) == 21
    assert list(data_folder.iterdir()) == [target]


@pytest.mark.usefixtures("few_shapes")
@pytest.mark.parametrize(
    "content", ["[]", '{"train": "x"}', '{"train": [1]}', '{"train": ["a"], "dev": ["a"]}', "{"]
)
def test_damaged_shapes_are_refused(tmp_path: Path, content: str) -> None:
    root = load_dataset("shapes", tmp_path / "s").root.parent
    write(root / "splits.json", content)
    with pytest.raises(CapGenError, match=r"splits\.json"):
        load_dataset("shapes", root)


def test_the_registry_and_its_errors() -> None:
    assert list(DATASETS) == ["shapes", "many_shapes", "flickr8k", "flickr30k", "coco", "folder"]
    for ask in (load_dataset, download_dataset):
        with pytest.raises(CapGenError, match="choose one of shapes"):
            ask("flickr9k")


def test_a_data_set_that_cannot_be_written_names_the_folder(
    data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("capgen_utils.common.files.tempfile.mkdtemp", read_only)
    with pytest.raises(CapGenError, match=f"{data_folder}.*Read-only"):
        load_dataset("shapes")
