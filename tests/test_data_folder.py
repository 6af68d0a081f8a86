"""Folders of pictures, with any name and some junk in them, and the commands around them."""

import cProfile
import errno
import hashlib
import json
import os
import pstats
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from minisimclr import data
from minisimclr.cli import main
from minisimclr.cli.data import class_counts, samples, show
from minisimclr.config import TrainConfig
from minisimclr.data import (
    Dataset,
    Options,
    Plan,
    cache,
    folder,
    from_arrays,
    open_dataset,
    prepare,
    prepared,
)
from minisimclr.embed import probe_run
from minisimclr.errors import ConfigError, DataError, OutputError
from minisimclr.train import pretrain


def save(path, shade=0, size=(20, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade % 256, 0, 0)).save(path)


def load(path):
    with Image.open(path) as image:
        return np.asarray(image)


def link(path, target):
    try:
        path.symlink_to(target, target_is_directory=target.is_dir())
    except OSError:
        pytest.skip("links may not be made here")


def run(capsys, *arguments):
    """Exit code, standard output and standard error of a command."""
    with pytest.raises(SystemExit) as exit:
        main([str(a) for a in arguments])
    return exit.value.code, *capsys.readouterr()


def test_class_folders(pictures):
    dataset = open_dataset(pictures, 16)
    assert dataset.class_names == ("blob", "check", "stripe")
    assert dataset.file_names[0] == "blob/00.png"
    assert dataset.labels.tolist() == [0] * 40 + [1] * 40 + [2] * 40
    for name, share in (("pretrain", 24), ("labelled", 8), ("test", 8)):
        assert np.bincount(dataset.labels[dataset.split(name)]).tolist() == [share] * 3
    rows = np.concatenate([dataset.split(n) for n in ("pretrain", "labelled", "test")])
    assert sorted(rows) == list(range(120))
    # The choice is part of what results mean: it must never change.
    assert hashlib.sha256(dataset.splits.tobytes()).hexdigest()[:16] == "71f62d3284158212"


def test_a_budget_of_labels_leaves_the_test_pictures_alone(pictures):
    budgets = 1, 20, None  # the last is what other tests open
    tests = [
        prepare(pictures, 16, Options(labels_per_class=n)).split("test").tolist() for n in budgets
    ]
    assert len(tests[0]) == 24 and tests[0] == tests[1] == tests[2]


def test_a_sample_is_of_all_classes_and_only_of_pretrain(pictures):
    dataset = open_dataset(pictures, 16)
    pixels = [image.tobytes() for image in dataset.images]
    rows = [[pixels.index(image.tobytes()) for image in dataset.sample(n)] for n in (5, 24, 999)]
    assert sorted(rows[2]) == dataset.split("pretrain").tolist()
    assert rows[1] == rows[2][:24] and rows[0] == rows[1][:5]
    assert np.bincount(dataset.labels[rows[1]], minlength=3).min() >= 4
    assert rows[0] == [60, 62, 15, 86, 96]  # for ever


def test_a_sample_without_pretrain_is_not_of_pictures_to_test_with(tmp_path):
    for i in range(6):
        save(tmp_path / "ab"[i // 3] / f"{i}.png", 40 * i)
    dataset = prepare(tmp_path, 16, Options(labels_per_class=2))
    assert not len(dataset.split("pretrain"))
    labelled = dataset.images[dataset.split("labelled")]
    np.testing.assert_array_equal(np.sort(dataset.sample(9), 0), np.sort(labelled, 0))


@pytest.mark.parametrize(
    "counts, name", [((2, 5, 113), "pretrain"), ((1, 2, 117), "labelled"), ((1, 1, 118), "test")]
)
def test_a_sample_is_of_pretrain_however_large_other_splits_are(counts, name, pictures):
    dataset = open_dataset(pictures, 20)
    dataset = replace(dataset, splits=np.repeat(np.arange(3, dtype=np.uint8), counts))
    seen = {image.tobytes() for image in dataset.sample(2)}
    assert len(seen) == 2
    assert seen <= {image.tobytes() for image in dataset.images[dataset.split(name)]}


def test_a_class_alone_is_nothing_to_learn(tmp_path):
    for i in range(10):
        save(tmp_path / "images" / f"{i}.png", 9 * i)
    dataset = open_dataset(tmp_path, 16)
    assert len(dataset.split("pretrain")) == 10 and dataset.class_names == ("images",)
    for i in range(5):
        save(tmp_path / "split/train/a" / f"{i}.png", 9 * i)
    save(tmp_path / "split/test/a/5.png")
    dataset = open_dataset(tmp_path / "split", 16)  # split already
    assert [len(dataset.split(n)) for n in ("pretrain", "labelled", "test")] == [4, 1, 1]


def test_small_classes(tmp_path):
    for name, count in (("one", 1), ("two", 2), ("three", 3), ("eight", 8)):
        for i in range(count):
            save(tmp_path / name / "deep/er" / f"{i}.png", i)
    dataset = open_dataset(tmp_path, 16)
    assert dataset.class_names == ("eight", "one", "three", "two")
    counts = {n: np.bincount(dataset.labels[dataset.split(n)], minlength=4).tolist()
              for n in ("pretrain", "labelled", "test")}  # fmt: skip
    assert counts == {"pretrain": [4, 1, 1, 2], "labelled": [2, 0, 1, 0], "test": [2, 0, 1, 0]}
    del dataset  # Windows replaces no cache that is open
    dataset = prepare(tmp_path, 16, Options(labels_per_class=1))
    assert np.bincount(dataset.labels[dataset.split("labelled")]).tolist() == [1, 0, 1]
    with pytest.raises(ConfigError, match="labels per class is 3, but 'three' has only 2"):
        prepare(tmp_path, 16, Options(labels_per_class=3))


def test_options_go_along_to_other_sizes(tmp_path, capsys):
    for i in range(12):
        save(tmp_path / "ab"[i % 2] / f"{i}.png", i)
    prepare(tmp_path, 24, Options(labels_per_class=1))
    prepare(tmp_path, 16, Options(labels_per_class=2))
    made = [open_dataset(tmp_path, size) for size in (16, 24, 32)]
    assert [len(dataset.split("labelled")) for dataset in made] == [4, 2, 4]
    assert str(made[2].path) in run(capsys, "data", "info", tmp_path)[1]  # the last one made
    assert run(capsys, "data", "info", tmp_path, "--image-size", 33)[0] == 3
    with pytest.raises(ConfigError, match="is a finished cache: prepare its source"):
        prepare(made[2].path, options=Options(labels_per_class=2))
    for given in ("--image-size=33", "--images-tar=x", "--url=http://x", "--allow-unverified"):
        code, _, err = run(capsys, "data", "prepare", made[2].path, given)
        assert code == 2 and "is a finished cache: prepare its source with other options" in err


def test_a_folder_of_the_name_of_a_data_set_lends_it_no_options(tmp_path, monkeypatch):
    monkeypatch.setattr(data.toydogs, "SPLIT_SIZES", {"pretrain": 20, "labelled": 5, "test": 6})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    for i in range(12):
        save(tmp_path / "toydogs/a" / f"{i}.png", i)
    prepare(tmp_path / "toydogs", 16, Options(labels_per_class=1))
    assert open_dataset("toydogs", 16).options == Options()
    same_name = {data.cache_path(tmp_path / place / "photos", 16)[0] for place in "ab"}
    assert len(same_name) == 2


def test_a_file_may_have_the_name_of_a_split(tmp_path):
    for i in range(3):
        save(tmp_path / "a" / f"{i}.png", i)
    (tmp_path / "train").write_text("a list of names")
    dataset = open_dataset(tmp_path, 16)
    assert len(dataset.images) == 3 and dataset.notes == {"ignored_files": 1}


def test_a_change_within_a_second_is_seen(tmp_path):
    save(file := tmp_path / "a" / "0.png")
    seen = set()
    for moment in (10**18, 10**18 + 5 * 10**8):
        os.utime(file, ns=(moment, moment))
        seen.add(folder.source(tmp_path, Options()).identity)
    assert len(seen) == 2


def test_a_split_has_a_name(pictures):
    with pytest.raises(ConfigError, match="split 'train': there are pretrain, labelled, test"):
        open_dataset(pictures, 16).split("train")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_path_that_cannot_be_is_an_error(name):
    absent = os.name == "nt" and len(name) > 255  # to Windows
    with pytest.raises(DataError, match="no such folder" if absent else "cannot be read"):
        open_dataset(name)


def test_a_link_to_itself_is_an_error(tmp_path):
    link(tmp_path / "loop", tmp_path / "loop")
    with pytest.raises(DataError, match="cannot be read: "):
        open_dataset(tmp_path / "loop")


def test_an_empty_name_is_no_data_set():
    with pytest.raises(ConfigError, match="a name or a path, and this is empty"):
        open_dataset("")


def test_unlabelled_folder(tmp_path):
    for i in range(5):
        save(tmp_path / f"{i}.PNG", i)
    dataset = open_dataset(tmp_path, 16)
    assert dataset.labels.tolist() == [-1] * 5 and dataset.class_names == ()
    assert [len(dataset.split(n)) for n in ("pretrain", "labelled", "test")] == [5, 0, 0]


@pytest.mark.parametrize(
    "train, others",
    [
        ("Train", ("test",)),
        ("Training", ("valid",)),
        ("train", ("Testing", "val")),
        ("training", ("validation",)),
        ("train", ("dev",)),
    ],
)
def test_folders_that_are_split_already(tmp_path, train, others):
    for top in (train, *others):
        for i in range(20):
            save(tmp_path / top / "ab"[i % 2] / f"{i}.png", i)
    dataset = open_dataset(tmp_path, 16)
    assert dataset.class_names == ("a", "b")
    tests = {dataset.file_names[row] for row in dataset.split("test")}
    assert tests == {name for name in dataset.file_names if name.startswith(f"{others[0]}/")}
    rest = 40 - 20 * (len(others) == 1)  # what is for checking only is for training, too
    assert len(dataset.split("labelled")) == rest / 5
    assert np.bincount(dataset.labels[dataset.split("pretrain")]).tolist() == [rest * 0.4] * 2
    assert np.bincount(dataset.labels[dataset.split("test")]).tolist() == [10, 10]


def test_class_folders_may_be_links_inside_splits_too(pictures, tmp_path):
    for split in ("train", "val_set"):
        (tmp_path / "all" / split).mkdir(parents=True)
        link(tmp_path / "all" / split / "check", pictures / "check")
        link(tmp_path / "all" / split / "blob", pictures / "blob")
    link(tmp_path / "all" / "train" / "stripe", tmp_path / "all")  # a ring is no trouble
    dataset = open_dataset(tmp_path / "all", 16)
    assert dataset.class_names == ("blob", "check")
    assert len(dataset.split("test")) == len(dataset.images) / 2 > 2


def test_a_split_may_have_pictures_without_labels(tmp_path):
    for i in range(30):
        top = "Train Set/a", "Train Set/b", "test-set/a", "unlabeled", "unlabelled/deep/er"
        save(tmp_path / top[i % 5] / f"{i}.png", i)
    dataset = open_dataset(tmp_path, 16)
    assert dataset.class_names == ("a", "b")
    assert len(dataset.split("labelled")) == 2 and len(dataset.split("test")) == 6
    free = dataset.split("pretrain")
    assert len(free) == 22 and (dataset.labels[free] == -1).sum() == 12


def test_a_folder_of_a_splits_name_may_be_a_class(tmp_path):
    for i in range(9):
        save(tmp_path / ("car", "bus", "train")[i % 3] / f"{i}.png", i)
    assert open_dataset(tmp_path, 16).class_names == ("bus", "car", "train")


def test_a_split_without_classes_keeps_its_test_pictures_out(tmp_path):
    for i in range(6):
        save(tmp_path / ("train" if i < 4 else "test") / f"{i}.png", i)
    dataset = open_dataset(tmp_path, 16)
    assert dataset.labels.tolist() == [-1] * 6 and dataset.class_names == ()
    assert [len(dataset.split(n)) for n in ("pretrain", "labelled", "test")] == [4, 0, 2]


def test_splits_inside_classes_are_pointed_out(tmp_path):
    for i, name in enumerate(("a/train/1", "a/test_set/2", "b/train/3", "b/test_set/4")):
        save(tmp_path / f"{name}.png", i)
    with pytest.warns(UserWarning, match="splits in classes do not count: move them up"):
        assert open_dataset(tmp_path, 16).class_names == ("a", "b")
    shutil.move(tmp_path / "b/test_set", tmp_path / "b/east")
    shutil.move(tmp_path / "a/test_set", tmp_path / "a/west")
    assert len(open_dataset(tmp_path, 16).images) == 4  # and no warning


def test_classes_inside_another_folder_are_pointed_out(tmp_path):
    for name in ("images/a/1.png", "images/b/2.png"):
        save(tmp_path / name)
    with pytest.warns(UserWarning, match=f"one class, 'images': .*name .*{tmp_path.name}.images$"):
        assert open_dataset(tmp_path, 16).class_names == ("images",)
    assert open_dataset(tmp_path / "images", 16).class_names == ("a", "b")
    (tmp_path / "deeper").mkdir()
    shutil.copytree(tmp_path / "images", tmp_path / "deeper/images/all/Images")
    with pytest.warns(UserWarning, match="one class, 'images': .*name .*images.all.Images$"):
        open_dataset(tmp_path / "deeper", 16)
    shutil.rmtree(tmp_path / "deeper")
    for name in ("train/a/deep/1.png", "test/a/deep/2.png"):
        save(tmp_path / "split" / name)
    assert open_dataset(tmp_path / "split", 16).class_names == ("a",)  # and no warning
    shutil.rmtree(tmp_path / "split")
    save(tmp_path / "images/3.png")  # a class with folders in it
    assert open_dataset(tmp_path, 16).class_names == ("images",)


def test_what_does_not_count(tmp_path, capsys):
    for name in ("a/1.jpg", "a/2.webp", "b/3.TIF", ".hidden/4.png", "b/.5.png", "b/.c/6.png"):
        save(tmp_path / name)
    (tmp_path / "README.txt").write_text("hello")
    (tmp_path / "a/labels.csv").write_text("hello")
    link(tmp_path / "c", tmp_path / "a")
    link(tmp_path / "a/loop", tmp_path)
    dataset = open_dataset(tmp_path, 16)
    assert dataset.file_names == ("a/1.jpg", "a/2.webp", "b/3.TIF", "c/1.jpg", "c/2.webp")
    assert dataset.notes == {"ignored_files": 3}  # README and twice labels.csv
    shutil.copy(tmp_path / "a/1.jpg", tmp_path / "a/6.JFIF")  # as Windows' browsers save them
    assert "a/6.JFIF" in open_dataset(tmp_path, 16).file_names


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        ([], "holds no pictures"),
        (["a/x.svg", "notes.txt"], "holds no pictures"),
        (["a/x.png", "y.png"], r"has class folders, but 'y\.png'"),
        (["Train/a/x.png"], "holds Train, not train and test: name one of its folders"),
        (["test/a/x.png", "val/a/x.png"], "holds test and val, not train and test: name one"),
        (["train/a/x.png", "test/x.png"], r"has class folders, but 'test[/\\\\]+x\.png'"),
        (["train/a/x.png", "test/a/x.png", "y.png"], r"has class folders, but 'y\.png'"),
        (["train/x.png", "test/x.png", "y.png"], r"has class folders, but 'y\.png'"),
        (["train/a/x.png", "test/a/x.png", "set/x.png"], "set and test and train: name one of"),
        (["train/a/x.png", "test/a/x.png", "sunset/x.png"], "sunset and test and train: name one"),
    ],
)
def test_folders_that_are_no_data_set(tmp_path, contents, reason):
    for name in contents:
        save(tmp_path / name) if name.endswith("png") else (
            (tmp_path / name).parent.mkdir(exist_ok=True),
            (tmp_path / name).write_bytes(b"GIF89a"),
        )
    with pytest.raises(DataError, match=reason):
        open_dataset(tmp_path, 16)


def test_a_missing_folder_has_no_cache_to_prepare(tmp_path, capsys):
    code, _, said = run(capsys, "data", "info", tmp_path / "nowhere")
    assert (code, said) == (3, f"error: {tmp_path / 'nowhere'}: no such folder or file\n")


def test_a_link_to_nothing_stops_only_where_a_picture_should_be(tmp_path):
    for i in range(3):
        save(tmp_path / "a" / f"{i}.png")
    link(tmp_path / "a" / "notes.txt", tmp_path / "gone")
    assert len(open_dataset(tmp_path, 16).images) == 3
    link(tmp_path / "notes.txt", tmp_path / "gone")
    assert len(open_dataset(tmp_path, 16).images) == 3
    link(tmp_path / "a" / "ring", tmp_path / "a" / "ring")
    link(tmp_path / "ring", tmp_path / "ring")
    assert len(open_dataset(tmp_path, 16).images) == 3
    link(tmp_path / "a" / "x.PNG", tmp_path / "gone")
    with pytest.raises(DataError, match=r"x\.PNG: cannot be read"):
        open_dataset(tmp_path, 16)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    scandir = os.scandir

    def closed(path):
        if Path(path).name == "a":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    save(tmp_path / "a" / "1.png")
    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(DataError, match=r"[\\/]a: cannot be read \(Permission denied\)$"):
        open_dataset(tmp_path, 16)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes with names")
def test_a_pipe_is_no_picture(tmp_path):
    for i in range(3):
        save(tmp_path / "a" / f"{i}.png")
    os.mkfifo(tmp_path / "a" / "x.png")  # to read it would wait for ever
    os.mkfifo(tmp_path / "y.png")
    assert len(open_dataset(tmp_path, 16).images) == 3


def test_missing_folder_broken_link_and_bad_values(tmp_path):
    with pytest.raises(DataError, match="no such folder, nor one of the data sets toydogs"):
        open_dataset(tmp_path / "toydog")
    save(tmp_path / "a/1.png")
    with pytest.raises(DataError, match=r"1\.png: no cache, or damaged; for pictures"):
        open_dataset(tmp_path / "a/1.png")
    for size in (0, 7, 1025):
        with pytest.raises(ConfigError, match=f"cannot be stored with {size} px: choose 8 to 1024"):
            open_dataset(tmp_path, size)
    for options in ({"crop": "boxes"}, {"labels_per_class": 0}, {"crop": "left"}):
        with pytest.raises(ConfigError):
            prepare(tmp_path, 16, Options(**options))
    for given in ({"allow_unverified": True}, {"url": "http://x"}, {"archives": {"lists": "x"}}):
        with pytest.raises(ConfigError, match="for stanford-dogs only"):
            prepare(tmp_path, 16, **given)
    with pytest.raises(ConfigError, match="toydogs has no"):
        prepare("toydogs", 16, Options(skip_bad=True))
    link(tmp_path / "a/2.png", tmp_path / "gone")
    with pytest.raises(DataError, match=r"2\.png: cannot be read"):
        open_dataset(tmp_path, 16)


NAMES = {
    "unicode": "chien \u00e9t\u00e9 \u72ac \U0001f415",
    "spaces": "  two  spaces ",
    "newline": "new\nline",
    "quotes": 'it\'s "so" $HOME `x` \\ *?[]',
    "255 bytes": "x" * 251,
    "not UTF-8": "caf\udce9",
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_of_any_kind(tmp_path, kind, capsys):
    root = tmp_path / NAMES[kind]
    try:
        save(root / NAMES[kind] / (NAMES[kind] + ".png"))
    except (OSError, UnicodeError):
        pytest.skip("this file system does not take the name")
    dataset = open_dataset(root, 16)
    assert dataset.file_names == (f"{NAMES[kind]}/{NAMES[kind]}.png",)
    assert dataset.path.name.isascii() and " " not in dataset.path.name
    code, out, _ = run(capsys, "data", "info", root, "--image-size", 16, "--json")
    assert code == 0 and json.loads(out)["images"] == 1
    assert run(capsys, "data", "info", root, "--image-size", 16)[0] == 0
    (root / NAMES[kind] / (NAMES[kind] + ".png")).write_bytes(b"junk")
    with pytest.raises(DataError, match="cannot be decoded"):
        prepare(root, 16)


def test_very_long_path(tmp_path):
    folder = tmp_path
    while len(str(folder)) < 3000:
        folder /= "long" * 50
    try:
        save(folder / "a/1.png")
    except OSError:
        pytest.skip("this file system does not take the name")
    assert len(open_dataset(folder, 16).images) == 1


def bad_folder(root, good: int, bad: int):
    for i in range(good):
        save(root / f"{i:03}.png", i)
    for i in range(bad):
        (root / f"{i:03}.jpg").write_bytes(b"<!doctype html>")
    return root


def test_bad_picture_is_an_error_that_names_it(tmp_path, capsys):
    code, _, err = run(capsys, "data", "prepare", bad_folder(tmp_path, 30, 1))
    assert code == 3
    assert "'000.jpg' cannot be decoded" in err and "--skip-bad" in err and err.count("\n") == 1
    assert run(capsys, "data", "prepare", tmp_path, "--skip-bad")[0] == 0  # one may always be bad


def test_skipped_pictures_are_listed(tmp_path, capsys):
    bad_folder(tmp_path, 250, 2)
    code, out, _ = run(capsys, "data", "prepare", tmp_path, "--skip-bad", "--image-size", 16)
    assert code == 0 and "000.jpg  cannot be decoded" in out and "001.jpg" in out
    dataset = open_dataset(tmp_path, 16)
    assert list(dataset.notes["skipped"]) == ["000.jpg", "001.jpg"]
    assert len(dataset.images) == len(dataset.labels) == len(dataset.file_names) == 250
    assert dataset.images[:, 8, 8, 0].tolist() == [i % 256 for i in range(250)]
    dataset.verify()


def test_what_is_left_keeps_its_name_label_and_split(tmp_path):
    for i in range(240):
        save(tmp_path / "ab"[i % 2] / f"{i:03}.png", i)
    (tmp_path / "a" / "000.jpg").write_bytes(b"junk")  # before all others
    (tmp_path / "a" / "notes.txt").touch()
    plan = folder.source(tmp_path, Options()).plan()
    planned = dict(zip(plan.names, plan.splits.tolist(), strict=True))
    told = []
    left = prepare(tmp_path, 16, Options(skip_bad=True), lambda *a: told.append(a))
    assert (241, 241) in told
    assert len(left.images) == 240 and left.notes["ignored_files"] == 1
    for row, name in enumerate(left.file_names):
        assert left.images[row, 8, 8, 0] == int(Path(name).stem)
        assert left.class_names[left.labels[row]] == name[0]
        assert left.splits[row] == planned[name]


def test_a_picture_that_can_be_read_only_once_is_skipped_too(tmp_path, monkeypatch):
    """As on a network's disk: the second pass may find others."""
    bad_folder(tmp_path, 250, 1)
    (tmp_path / "001.jpg").write_bytes(b"junk")
    read, reads = folder.decode_file, []

    def once(path, size):
        reads.append(path.name)
        if path.name == "001.jpg":
            path = tmp_path / ("100.png" if reads.count("001.jpg") == 1 else path.name)
        return read(path, size)

    monkeypatch.setattr(folder, "decode_file", once)
    monkeypatch.setattr("minisimclr.data.cache.available_cores", lambda: 1)
    left = prepare(tmp_path, 16, Options(skip_bad=True))
    assert list(left.notes["skipped"]) == ["000.jpg", "001.jpg"] and len(left.images) == 250
    left.verify()
    (tmp_path / "000.jpg").rename(tmp_path / "002.jpg")  # now 1 % are bad in the first pass
    (tmp_path / "003.jpg").write_bytes(b"junk")
    del left, reads[:]
    with pytest.raises(DataError, match="with it more than 1 %"):
        prepare(tmp_path, 16, Options(skip_bad=True))


def test_what_to_type_about_a_bad_picture_keeps_size_and_options(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CHUNKS", 3)  # so that some are made together
    bad_folder(tmp_path, 30, 1)
    (tmp_path / "000.jpg").rename(tmp_path / "015.jpg")  # in the midst of good ones
    said = r"try `minisimclr data prepare NAME --image-size 24 --skip-bad --labels-per-class 3`$"
    said = rf"'015\.jpg' cannot be decoded.* {said}"
    with pytest.raises(DataError, match=said):
        prepare(tmp_path, 24, Options(labels_per_class=3))


def test_no_memory_is_no_bad_picture(tmp_path, monkeypatch):
    bad_folder(tmp_path, 30, 0)
    monkeypatch.setattr("minisimclr.data.images.to_rgb", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        prepare(tmp_path, 16, Options(skip_bad=True))
    monkeypatch.setattr("minisimclr.data.images.to_rgb", Mock(side_effect=KeyError))
    with pytest.raises(DataError, match=r"cannot be decoded \(KeyError\)"):
        prepare(tmp_path, 16)


def test_too_many_bad_pictures(tmp_path, capsys):
    code, _, err = run(capsys, "data", "prepare", bad_folder(tmp_path, 150, 2), "--skip-bad")
    assert code == 3 and "more than 1 %" in err


def test_only_bad_pictures(tmp_path):
    with pytest.raises(DataError, match="no picture is left"):
        prepare(bad_folder(tmp_path, 0, 1), 16, Options(skip_bad=True))


def test_commands(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("minisimclr.cli.display.FIRST", 1e9)  # however slow the machine
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for command in ("verify", "info"):
        code, out, err = run(capsys, "data", command, pictures)
        assert (code, out) == (3, "") and "`minisimclr data prepare NAME` makes it" in err
        code, _, err = run(capsys, "data", command, pictures, "--image-size", 24)
        assert "`minisimclr data prepare NAME --image-size 24` makes it" in err
    code, out, err = run(capsys, "data", "prepare", pictures)
    assert (code, err) == (0, "")
    assert "images  120" in out and "pretrain  72" in out
    code, out, _ = run(capsys, "data", "verify", pictures, "--json")
    assert code == 0 and json.loads(out)["valid"] is True
    figures = tmp_path / "figures.json"
    sheet = tmp_path / "sheet.png"
    code, out, _ = run(capsys, "data", "info", pictures, "--sheet", sheet, "--json", figures)
    assert code == 0
    values = json.loads(figures.read_text())
    assert values["path"] == str(open_dataset(pictures).path)
    assert values["classes"]["blob"] == {"pretrain": 24, "labelled": 8, "test": 8}
    assert values["image_size"] == 80 and values["duplicates"] == 0
    code, _, err = run(capsys, "data", "info", pictures, "--sheet", sheet)
    assert code == 2 and f"'{sheet}' exists: choose another name" in err
    pixels = load(sheet)
    assert pixels.shape == (3 * 80, 150 + 10 * 80, 3)
    first = open_dataset(pictures).images[0]
    np.testing.assert_array_equal(pixels[:80, 150:230], first)
    assert run(capsys, "data", "info", pictures, "--sheet", figures / "sheet.png")[0] == 4
    assert run(capsys, "data", "info", pictures, "--sheet", tmp_path / "a.jpg")[0] == 2
    assert not (tmp_path / "a.jpg").exists()
    assert run(capsys, "data", "info", pictures, "--sheet", tmp_path / "A.PNG")[0] == 0
    assert run(capsys, "data", "prepare", pictures, "--crop", "left")[0] == 2
    assert run(capsys, "data", "prepare", pictures, "--labels-per-class", 0)[0] == 2
    assert run(capsys, "data", "prepare", pictures, "--crop", "boxes")[0] == 2


def test_info_of_duplicates_and_unlabelled_sheet(tmp_path, capsys):
    for i in range(13):
        save(tmp_path / f"{i:02}.png", 7 if i > 10 else 20 * i)
    prepare(tmp_path, 16)
    sheet = tmp_path / "sheet.png"
    code, out, _ = run(capsys, "data", "info", tmp_path, "--image-size", 16, "--sheet", sheet)
    assert code == 0 and "duplicates  1" in out
    assert load(sheet).shape == (2 * 80, 150 + 10 * 80, 3)  # 16 px, five times as large


def test_a_sheet_has_at_most_12_rows():
    labels = np.arange(260) % 13
    images = np.full((260, 2, 2, 3), labels[:, None, None, None], np.uint8)
    for names, rows in (
        ("abcdefghijklm", "acegikm"),
        ("", [f"from {i}" for i in range(0, 120, 10)]),
    ):
        shown = samples(SimpleNamespace(class_names=names, images=images, labels=labels))
        assert [name for name, _ in shown] == [*rows]
        assert {len(pictures) for _, pictures in shown} == {10}
        for name, pictures in shown if names else ():
            assert {*pictures[:, 0, 0, 0]} == {names.index(name)}
    starts = {int(name.split()[1]): pictures for name, pictures in shown}  # the last, unlabelled
    for i, pictures in starts.items():
        np.testing.assert_array_equal(pictures, images[i : i + 10])
    unlabelled = SimpleNamespace(class_names="ab", images=images[:5], labels=labels[:5] * 0 - 1)
    assert [name for name, _ in samples(unlabelled)] == ["from 0"]


def test_duplicates_across_splits_are_named(tmp_path, capsys):
    for i in range(10):
        save(tmp_path / "a" / f"{i}.png", 5)
        save(tmp_path / "b" / f"{i}.png", 50)
    code, out, _ = run(capsys, "data", "prepare", tmp_path, "--image-size", 16, "--json")
    assert code == 0
    splits = prepare(tmp_path, 16).splits
    assert json.loads(out)["duplicates"] == 18
    expected = []  # every picture but the first of its class, with the first in another split
    for start, name in ((0, "a"), (10, "b")):
        own = splits[start : start + 10]
        others = [int(np.flatnonzero(own != split)[0]) for split in own]
        expected += [[f"{name}/{i}.png", f"{name}/{others[i]}.png"] for i in range(1, 10)]
    assert json.loads(out)["duplicates_across_splits"] == expected
    assert {first for _, first in expected} > {"a/0.png", "b/0.png"}


def test_of_many_duplicates_the_first_are_named(tmp_path, capsys):
    for i in range(60):
        save(tmp_path / "a" / f"{i:02}.png", 5)
    save(tmp_path / "b" / "0.png", 50)
    code, out, _ = run(capsys, "data", "prepare", tmp_path, "--image-size", 16)
    splits = prepare(tmp_path, 16).splits
    other = np.flatnonzero(splits[:60] != splits[0])[0]
    named = [line.split() for line in out.splitlines() if line.startswith(" " * 26 + "a/")]
    second = ["a/00.png" if split != splits[0] else f"a/{other:02}.png" for split in splits]
    assert (code, named) == (0, [[f"a/{i:02}.png", second[i]] for i in range(1, 21)])
    assert f"  and {59 - 20} more, which --json shows" in out


def test_lists_are_cut_after_20_lines_and_tables_are_not(capsys):
    show({"classes": {f"c{i}": {"test": i} for i in range(30)}, "pairs": [["a", "b"]] * 20}, None)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 30 + 1 + 20 and lines[30].split() == ["c29", "test", "29"]
    show({"pairs": [["a", "b"]] * 1234}, None)
    head, *lines, last = capsys.readouterr().out.splitlines()
    assert (head.split(), len(lines)) == (["pairs", "1234"], 20)
    assert last.strip() == "and 1,214 more, which --json shows"


def test_toydogs_is_drawn_once(tmp_path, monkeypatch):
    from minisimclr.data import toydogs

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(toydogs, "SPLIT_SIZES", {"pretrain": 20, "labelled": 5, "test": 6})
    dataset = open_dataset("toydogs")
    assert dataset.class_names == toydogs.CLASS_NAMES
    side = toydogs.IMAGE_SIZE
    assert dataset.images.shape == (31, side, side, 3)
    assert dataset.split("test").tolist() == list(range(25, 31))
    np.testing.assert_array_equal(dataset.images[26], toydogs.draw(26, side))
    assert dataset.labels[26] == toydogs.label(26)
    monkeypatch.delattr(toydogs, "draw")
    assert open_dataset("toydogs").fingerprint == dataset.fingerprint


def test_what_was_prepared_last_is_shown(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for size in (None, 16):  # the usual size, then another
        side = prepare(pictures, size).images.shape[1]
        assert prepared(pictures).images.shape[1] == side
    assert prepared(pictures, 80).images.shape[1] == 80


def test_real_photos(test_data):
    """Ten breeds at original size, through the whole path."""
    dataset = open_dataset(test_data / "dog-photos", 96)
    assert dataset.images.shape == (80, 96, 96, 3) and len(dataset.class_names) == 10
    assert [len(dataset.split(n)) for n in ("pretrain", "labelled", "test")] == [40, 20, 20]


def test_listing_many_files_shows_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "LISTED", 4)
    for i in range(9):
        save(tmp_path / f"{i}.png", i)
    told = []
    open_dataset(tmp_path, 16, lambda *done: told.append(done))
    assert told[:3] == [(4, 0), (8, 0), (1, 9)] and told[-1] == (9, 9)
    assert len(open_dataset(tmp_path, 16).images) == 9  # shown to nobody


def test_a_million_pictures_are_listed_soon(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(200):
        (tmp_path / "a" / f"{i}.png").touch()
    with cProfile.Profile() as profile:
        folder.source(tmp_path, Options())
    assert pstats.Stats(profile).total_calls < 40 * 200  # with a Path for each it was 100 each


def test_mtime_of_any_value(tmp_path):
    save(tmp_path / "1.png")
    for moment in (0, time.time() + 10**8):
        os.utime(tmp_path / "1.png", (moment, moment))
        assert len(open_dataset(tmp_path, 16).images) == 1


def test_source_may_be_read_only(pictures, tmp_path):
    source = shutil.copytree(pictures, tmp_path / "source")
    source.chmod(0o555)
    try:
        before = sorted(source.rglob("*"))
        open_dataset(source, 16)
        assert sorted(source.rglob("*")) == before
    finally:
        source.chmod(0o755)


def test_classes_are_counted_in_one_pass(pictures, monkeypatch):
    dataset, seen = open_dataset(pictures, 16), []
    monkeypatch.setattr(Dataset, "split", lambda self, name: seen.append(name) or np.arange(9))
    nine = dict.fromkeys(("pretrain", "labelled", "test"), 9)
    assert class_counts(dataset) == {
        "blob": nine, "check": dict.fromkeys(nine, 0), "stripe": dict.fromkeys(nine, 0)
    }  # fmt: skip
    assert seen == [*nine]  # and not once for each of, perhaps, 10,000 classes
    unsorted = replace(dataset, class_names=("stripe", "check", "blob"))
    assert class_counts(unsorted)["stripe"] == nine  # the first class, whatever its name


def test_classes_are_shared_out_without_a_look_at_all_pictures_for_each():
    class Labels(np.ndarray):
        def __eq__(self, other):
            raise AssertionError("a look at all pictures")

    labels = np.random.default_rng(0).integers(-1, 7, 200)
    testing = np.arange(200) % 9 == 0
    found = folder.split_classes(labels.view(Labels), testing, list("abcdefg"), None)
    counts = [np.bincount(found[(labels == k) & ~testing], minlength=3).tolist() for k in range(7)]
    assert counts == [[sum(c) - (fifth := round(sum(c) / 5)), fifth, 0] for c in counts]
    assert not found[(labels < 0) & ~testing].any() and (found[testing] == 2).all()


def test_pictures_in_memory_are_split_like_a_folder_and_trained_on(pictures, tmp_path):
    folder = open_dataset(pictures, 20)
    given = folder.images, folder.labels, folder.class_names
    made = from_arrays(tmp_path / "new/mine.h5", *given)
    for name in ("images", "labels", "splits", "duplicate_of"):
        np.testing.assert_array_equal(getattr(made, name), getattr(folder, name))
    assert (made.class_names, made.identity) == (folder.class_names, folder.identity)
    assert made.name == "mine"
    made.verify()
    path, first = made.path, made.path.read_bytes()
    del made  # Windows replaces no file that is open
    from_arrays(path, *given)
    assert path.read_bytes() == first  # runs go on
    config = TrainConfig(data=path, width=8, image_size=16, batch_size=32, epochs=1, threads=1)
    run = pretrain(config, tmp_path / "run", notify=lambda *_: None)
    assert probe_run(run, open_dataset(run.config.data))["test"] == 24
    assert folder.identity == run.trained_on
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    with pytest.raises(DataError, match=r"delete it, then `data\.from_arrays` makes it"):
        open_dataset(path).verify()


def test_names_of_classes_may_be_bytes(tmp_path):
    """As np.unique makes them of those in an HDF5 file, and as CIFAR-10 has them."""
    names, labels = np.unique([b"cat", "hérisson".encode(), b"cat"], return_inverse=True)
    images = np.zeros((3, 16, 16, 3), np.uint8)
    for given in names, list(names):
        made = from_arrays(tmp_path / "mine.h5", images, labels, given)
        assert made.class_names == ("cat", "hérisson")


def test_pictures_in_memory_may_be_split_before_or_have_no_labels(pictures, tmp_path):
    images = open_dataset(pictures, 20).images[:40]
    testing = np.arange(40) >= 30
    labels = np.arange(40, dtype=np.uint8) % 2
    split = from_arrays(tmp_path / "a.h5", images, labels, testing=testing, labels_per_class=2)
    assert split.class_names == ("0", "1")
    assert split.split("test").tolist() == list(range(30, 40))
    assert np.bincount(split.labels[split.split("labelled")]).tolist() == [2, 2]
    assert split.options.labels_per_class == 2
    (tmp_path / ".b.h5.0123abcd.tmp").touch()  # of a process that was killed
    none = from_arrays(tmp_path / "c.h5", images, labels, testing=np.zeros(40, bool))
    assert len(none.split("test")) == 0 and len(none.split("labelled")) == 8
    loose = from_arrays(tmp_path / "b.h5", images, labels_per_class=np.int64(2))
    assert not list(tmp_path.glob("*.tmp"))
    assert loose.split("pretrain").tolist() == list(range(40))
    assert set(loose.labels) == {-1}
    assert not loose.class_names


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"images": np.zeros((4, 3, 16, 16), np.uint8)}, r"\(N, S, S, 3\) uint8 with S from 8"),
        ({"images": np.zeros((4, 16, 16, 3), np.float32)}, r"not \(4, 16, 16, 3\) float32"),
        ({"images": np.zeros((4, 16, 12, 3), np.uint8)}, r"not \(4, 16, 12, 3\)"),
        ({"images": np.zeros((4, 4, 4, 3), np.uint8)}, r"not \(4, 4, 4, 3\)"),
        ({"images": np.zeros((0, 16, 16, 3), np.uint8)}, r"not \(0, 16, 16, 3\)"),
        ({"images": 3}, r"not \(\)"),
        ({"labels": [0, 1]}, r"\(4,\) integers .* not \(2,\)"),
        ({"labels": [0, 1, 0, 1.0]}, "float64"),
        ({"labels": ["a", "b", "b", "c"]}, "names: class_names, labels = np.unique"),
        ({"labels": [0, 1, 2, -2]}, "-2 to 2"),
        ({"labels": [0, 1, 2, 3], "class_names": ["a", "b"]}, "0 to 3, and there are 2"),
        ({"labels": [0, 1, 2, 2085620]}, r"not numbers such as 2085620: class_names, lab"),
        ({"class_names": ["a", "b", "crane", "crane"]}, "several classes are called 'crane'"),
        ({"testing": [2, 3, 1, 0]}, r"\(4,\) bool, not"),
    ],
)
def test_what_is_no_set_of_pictures_is_refused(tmp_path, changed, said):
    given = {"images": np.zeros((4, 16, 16, 3), np.uint8)} | changed
    with pytest.raises(ConfigError, match=said):
        from_arrays(tmp_path / "mine.h5", **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("names", [{"a", "b"}, {1: "b", 0: "a"}])
def test_names_of_classes_have_an_order(tmp_path, names):
    with pytest.raises((TypeError, KeyError)):
        from_arrays(tmp_path / "mine.h5", np.zeros((2, 16, 16, 3), np.uint8), [0, 1], names)
    assert not list(tmp_path.iterdir())


def test_info_tells_the_options_the_size_of_the_file_and_every_class(tmp_path, capsys):
    for i in range(50):
        save(tmp_path / "few" / "ab"[i % 2] / f"{i}.png", i)
        save(tmp_path / "many" / f"class{i % 25:02}" / f"{i}.png", i)
    options = Options(labels_per_class=1, skip_bad=True)
    path = prepare(tmp_path / "few", 16, options).path
    values = json.loads(run(capsys, "data", "info", tmp_path / "few", "--json")[1])
    assert (values["crop"], values["skip_bad"], values["labels_per_class"]) == ("centre", True, 1)
    assert values["bytes"] == path.stat().st_size
    prepare(tmp_path / "many", 16)
    assert run(capsys, "data", "info", tmp_path / "many")[1].count("  pretrain     ") == 25


def test_numbers_of_arrays_are_what_they_say(tmp_path, monkeypatch):
    images = np.zeros((5, 8, 8, 3), np.uint8)
    monkeypatch.setattr(data, "MANY", 3)
    made = from_arrays(tmp_path / "a.h5", images, np.arange(5, dtype=np.int8))
    assert len(made.class_names) == 5
    with pytest.raises(ConfigError, match="not numbers such as 5: "):
        from_arrays(tmp_path / "b.h5", images, [0, 1, 2, 3, 5])
    wrapped = np.array([0, 1, 0, 1, 2**64 - 1], np.uint64)  # -1, by chance, in 64 bits
    with pytest.raises(ConfigError, match=r"labels are from -1 .* 0 to 18446744073709551615"):
        from_arrays(tmp_path / "b.h5", images, wrapped, ["a", "b"])
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file cannot be made"):
        from_arrays(tmp_path / "file" / "b.h5", images)
    (photo := tmp_path / "dog.jpg").write_bytes(b"a picture")
    said = r"dog\.jpg is there, and no sound data set: choose another, or delete it"
    with pytest.raises(ConfigError, match=said):
        from_arrays(photo, images)
    assert photo.read_bytes() == b"a picture"
    assert asdict(Options(labels_per_class=np.int64(3)))["labels_per_class"].__class__ is int


def test_progress_counts_bad_pictures_and_shows_often(tmp_path):
    for i in range(120):
        save(tmp_path / "many" / "ab"[i % 2] / f"{i:03}.png", i)
    for i in range(10):
        save(tmp_path / "few" / "ab"[i % 2] / f"{i}.png", i)
    seen = []
    prepare(tmp_path / "many", 16, progress=lambda *now: seen.append(now))
    assert len(seen) >= 50
    seen.clear()
    (tmp_path / "few" / "a" / "0.png").write_bytes(b"no")
    prepare(tmp_path / "few", 16, Options(skip_bad=True), lambda *now: seen.append(now))
    assert (10, 10) in seen and seen[-1] == (9, 9)


def test_one_in_a_hundred_may_be_bad_however_often_they_are_read(tmp_path):
    calls = []

    def picture(row):
        calls.append(row)
        if row == 0 or (row == 1 and calls.count(1) > 1):  # good once
            raise DataError("cannot be read")
        return np.full((8, 8, 3), row, np.uint8)

    names, zeros = [f"{i}" for i in range(200)], np.zeros(200, np.int64)
    jobs = lambda size: ((i, picture, (i,)) for i in range(200))  # noqa: E731
    plan = Plan(names, zeros, ["x"], zeros.astype(np.uint8), jobs)
    recipe = {"source": "x", "size": 8, "options": asdict(Options(skip_bad=True))}
    cache.build(tmp_path / "c.h5", "x", plan, recipe, None)
    assert len(cache.load(tmp_path / "c.h5").images) == 198
