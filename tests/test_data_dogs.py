"""The official layout: lists, archives and boxes are read exactly or refused."""

import gzip
import hashlib
import io
import os
import re
import shutil
import struct
import tarfile
import tracemalloc
import zlib
from contextlib import suppress

import numpy as np
import official_layout as layout
import pytest
from PIL import Image

from minisimclr import data
from minisimclr.cli import main
from minisimclr.data import Options, matlab, open_dataset, prepare, prepared, stanford_dogs
from minisimclr.data.archives import members
from minisimclr.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory, monkeypatch):
    """What one test prepares with options would be taken for the next, in whatever order."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def dogs(tmp_path_factory):
    return layout.write_archives(tmp_path_factory.mktemp("data") / "dogs")


def test_small_layout(dogs):
    dataset = open_dataset(dogs, 24)
    train, test = layout.files()
    assert dataset.images.shape == (31, 24, 24, 3)
    assert dataset.file_names == tuple(sorted(train + test))
    assert dataset.class_names == ("Alpha", "flat-coated_beta", "Gamma")
    names = np.array(dataset.file_names)
    assert set(names[dataset.split("pretrain")]) == set(train)
    labelled, rest = dataset.split("labelled"), dataset.split("test")
    assert set(names[labelled]) | set(names[rest]) == set(test)
    # A fifth of 19 is 4; exact shares 1, 1.2 and 1.6 give one each and the last to the third.
    assert np.bincount(dataset.labels[labelled]).tolist() == [1, 1, 2]
    assert not set(labelled) & set(rest)
    assert dataset.labels.tolist() == [layout.BREEDS.index(n.split("/")[0]) for n in names]
    assert not dataset.notes["verified"]


def test_order_of_the_archive_does_not_matter(dogs, tmp_path, monkeypatch):
    monkeypatch.setattr(data.cache, "CHUNKS", 3)  # so that some are written together
    images = layout.image_members()
    mixed = [(f"deep/{name}", content) for name, content in images[20:] + images[:20][::-1]]
    other = open_dataset(layout.write_archives(tmp_path, mixed), 24)
    assert other.fingerprint == open_dataset(dogs, 24).fingerprint


def test_an_archive_that_changed_is_read_again(tmp_path, monkeypatch):
    dogs = layout.write_archives(tmp_path / "dogs")
    before = prepare(dogs, 24).recipe
    os.utime(dogs / "images.tar", (0, 0))
    older = prepare(dogs, 24).recipe
    with (dogs / "images.tar").open("ab") as file:
        file.write(bytes(512))
    os.utime(dogs / "images.tar", (0, 0))
    monkeypatch.chdir(dogs)
    larger = prepare(".", 24)
    assert larger.name == "dogs" and before != older != larger.recipe


def test_labels_per_class(dogs):
    chosen = {}
    for n in (1, 3):
        dataset = prepare(dogs, 24, Options(labels_per_class=n))
        chosen[n] = set(dataset.split("labelled"))
        assert np.bincount(dataset.labels[dataset.split("labelled")]).tolist() == [n] * 3
        assert len(dataset.split("pretrain")) == 12
        assert len(dataset.split("test")) == 19 - 3 * n
        del dataset  # Windows replaces no cache that is open
    assert chosen[1] < chosen[3]  # a larger budget adds to a smaller one
    with pytest.raises(ConfigError, match="'Alpha' has 5"):
        prepare(dogs, 24, Options(labels_per_class=5))


def test_boxes(tmp_path):
    """What is kept of each picture is its own box, which a colour of its own fills."""
    images, notes, colours = [], [], []
    for i, name in enumerate(sorted(TRAIN + TEST)):
        box, colour = (i % 25, i % 17, i % 25 + 12, i % 17 + 12), (8 * i, 255 - 8 * i, 5 * i)
        picture = Image.new("RGB", (40, 30), "white")
        picture.paste(colour, box)
        picture.save(buffer := io.BytesIO(), "PNG")
        images.append((f"Images/{name}", buffer.getvalue()))
        notes.append((f"Annotation/{name[:-4]}", layout.annotation(boxes=(box,))))
        colours.append(colour)
    dogs = layout.write_archives(tmp_path, images)
    layout.tar(dogs / "annotation.tar", notes[::-1])
    cropped = prepare(dogs, 12, Options(crop="boxes")).images
    assert (cropped == np.array(colours)[:, None, None]).all()
    del cropped  # Windows replaces no cache that is open
    assert (prepare(dogs, 12).images == 255).any(axis=(1, 2, 3)).all()


def test_open_follows_the_options_it_was_prepared_with(dogs):
    prepare(dogs, 16, Options(labels_per_class=2))
    assert len(open_dataset(dogs, 16).split("labelled")) == 6


def test_real_split(test_data):
    archives = stanford_dogs.in_folder(test_data / "stanford-dogs-80px")
    plan = stanford_dogs.source("dogs", archives, Options(), 0, False).plan()
    counts = np.bincount(plan.splits)
    assert counts.tolist() == [12000, 1716, 6864]
    per_breed = np.bincount(plan.labels[plan.splits == 1], minlength=120)
    tests = np.bincount(plan.labels[plan.splits > 0], minlength=120)
    assert np.abs(per_breed - tests / 5).max() < 1
    assert np.bincount(plan.labels[plan.splits == 0]).tolist() == [100] * 120
    # The choice is part of what results mean: it must never change.
    chosen = np.flatnonzero(plan.splits == 1)
    assert plan.names[chosen[0]] == "n02085620-Chihuahua/n02085620_11818.jpg"
    digest = hashlib.sha256(plan.splits.tobytes()).hexdigest()
    assert digest[:16] == "cee4e16e583d0aa8"


def test_lists_as_scipy_reads_them(test_data):
    scipy_io = pytest.importorskip("scipy.io")
    lists = dict(members(test_data / "stanford-dogs-80px/lists.tar"))
    for name, content in lists.items():
        referee = scipy_io.loadmat(io.BytesIO(content))
        ours = matlab.load(content, ("file_list", "labels"))
        assert ours["file_list"] == [str(x[0]) for x in referee["file_list"][:, 0]], name
        np.testing.assert_array_equal(ours["labels"], referee["labels"][:, 0])


def test_lists_may_hold_other_variables_of_any_kind():
    other = layout.matrix(2, (1, 1), b"", "of_fields")  # a structure, which is not read
    content = layout.mat(TRAIN, layout.numbered(TRAIN), deflate=False) + other
    lists = matlab.load(content, ("file_list", "labels"))
    assert lists["file_list"] == TRAIN and lists["of_fields"] is None
    with pytest.raises(DataError, match="is a damaged MATLAB file"):
        matlab.load(content, ("of_fields",))


def test_matlab_numbers_and_text_as_scipy_writes_them():
    scipy_io = pytest.importorskip("scipy.io")
    values = {
        "one": np.array([[7]], np.uint8),  # with its name in a small element
        "doubles": np.array([[1.5, np.nan, -2.0]]),
        "int32": np.arange(300, dtype=np.int32)[:, None],
        "int8": np.array([[-3], [120]], np.int8),
        "int16": np.array([[-3], [300]], np.int16),
        "uint16": np.array([[3], [40_000]], np.uint16),
        "uint32": np.array([[3], [4_000_000_000]], np.uint32),
        "int64": np.array([[-3], [1 << 40]]),  # NumPy's own, on most machines
        "uint64": np.array([[3], [1 << 63]], np.uint64),
        "float32": np.array([[0.1], [-7]], np.float32),
        "words": np.array(["a", "bc", "é", "long " * 9], object)[:, None],
    }
    for packed in (False, True):
        buffer = io.BytesIO()
        scipy_io.savemat(buffer, values, do_compression=packed)
        ours = matlab.load(buffer.getvalue(), tuple(values))
        assert ours["words"] == list(values["words"][:, 0])
        for name in values.keys() - {"words"}:
            np.testing.assert_array_equal(ours[name], values[name].ravel())


@pytest.mark.parametrize("kind, encoding", [(1, "latin-1"), (2, "latin-1"), (4, "utf-16-le"),
                                            (16, "utf-8"), (17, "utf-16-le")])  # fmt: skip
def test_matlab_text_in_each_of_its_encodings(kind, encoding):
    letters = layout.element(kind, "Zwergschnäuzer".encode(encoding))
    head = layout.mat([], LABELS[:0], deflate=False)[:128]
    content = head + layout.matrix(4, (1, 14), letters, "breed")
    assert matlab.load(content, ("breed",)) == {"breed": "Zwergschnäuzer"}


def test_what_is_no_matrix_is_passed_over():
    numbers = struct.pack("<IIii", 5, 8, 1, 2)  # of a file's own, with no name
    content = layout.mat(TRAIN, LABELS) + numbers
    assert matlab.load(content, ("file_list", "labels"))["file_list"] == TRAIN


def bomb() -> bytes:
    inner = zlib.compress(bytes(100 << 20), 9)
    return layout.mat([], np.zeros(0, np.uint8))[:128] + struct.pack("<II", 15, len(inner)) + inner


TRAIN, TEST = layout.files()
LABELS = layout.numbered(TRAIN)
SHAPE = struct.pack("<ii", len(TRAIN), 1)
NAN = np.where(np.arange(len(LABELS)) == 3, np.nan, LABELS.astype(float))


def test_a_list_may_be_shorter_than_its_labels_are_high():
    found = stanford_dogs.read_list(layout.mat(TRAIN[:2], 0 * LABELS[:2] + 3))
    assert found == dict.fromkeys(TRAIN[:2], 3)


BAD_LISTS = {
    "empty": (b"", "no little-endian MATLAB"),
    "text": (b"n02085620-Chihuahua/n02085620_5927.jpg\n" * 9, "no little-endian MATLAB"),
    "bomb": (bomb(), "more than 64 MiB"),
    "cut": (layout.mat(TRAIN, LABELS)[:-9], "damaged"),
    "text longer than its file": (
        layout.mat(["x" * 99], LABELS[:1], deflate=False)[:300],
        "ends behind the file",
    ),
    "another shape": (
        layout.mat(TRAIN, LABELS, deflate=False).replace(SHAPE, struct.pack("<ii", 13, 1), 1),
        "file_list has 12 values, but",
    ),
    "no labels": (layout.mat(TRAIN, LABELS, deflate=False).replace(b"labels", b"lapels"), "lacks"),
    "fewer files": (layout.mat(TRAIN[1:], LABELS), "11 files, but 12 labels"),
    "fewer labels": (layout.mat(TRAIN, LABELS[1:]), "12 files, but 11 labels"),
    "label 0": (layout.mat(TRAIN, LABELS - 1), "no whole numbers from 1"),
    "label 200": (
        layout.mat(TRAIN, np.where(LABELS == 3, 200, LABELS).astype("u1")),
        "do not number the breeds",
    ),
    "NaN": (layout.mat(TRAIN, NAN, 9), "no whole numbers from 1"),
    "half": (layout.mat(TRAIN, LABELS * 1.5, 9), "no whole numbers from 1"),
    "gap": (layout.mat(TRAIN, np.where(LABELS == 3, 4, LABELS).astype("u1")), "stands for|number"),
    "two breeds, one label": (layout.mat(TRAIN, LABELS // 2 + 1), "stands for"),
    "escape": (layout.mat(["../../etc/passwd", *TRAIN[1:]], LABELS), "not breed/picture"),
    "no folder": (layout.mat(["x.jpg", *TRAIN[1:]], LABELS), "not breed/picture"),
    "twice": (layout.mat([TRAIN[1], *TRAIN[1:]], LABELS), "twice"),
    "overlap": (layout.mat([TEST[0], *TRAIN[1:]], LABELS), "in both lists: 1, "),
}


@pytest.mark.parametrize("fault", BAD_LISTS)
def test_bad_lists_are_refused(tmp_path, fault):
    content, reason = BAD_LISTS[fault]
    lists = [("train_list.mat", content), layout.list_members()[1]]
    with pytest.raises(DataError, match=reason) as told:
        stanford_dogs.read_lists(layout.tar(tmp_path / "lists.tar", lists))
    of_one = fault not in ("label 200", "gap", "two breeds, one label", "overlap")
    assert str(told.value).startswith(f"{tmp_path / 'lists.tar'}: {'train_list.mat ' * of_one}")


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_archives_may_be_packed_in_any_way(suffix, tmp_path):
    for name in ("images", "lists"):
        (tmp_path / f"{name}.{suffix}").touch()
    found = stanford_dogs.in_folder(tmp_path)
    assert {p.name for p in found.values()} == {f"images.{suffix}", f"lists.{suffix}"}


def test_missing_list_is_named(tmp_path):
    path = layout.tar(tmp_path / "lists.tar", layout.list_members()[:1])
    with pytest.raises(DataError, match=r"has no test_list\.mat"):
        stanford_dogs.read_lists(path)


def test_lists_may_be_in_a_folder_and_breeds_without_a_number(tmp_path):
    lists = [
        (f"lists/{name}_list.mat", layout.mat([f.replace("n01-", "") for f in files], labels))
        for name, files, labels in (("train", TRAIN, LABELS), ("test", TEST, layout.numbered(TEST)))
    ]
    names = stanford_dogs.read_lists(layout.tar(tmp_path / "lists.tar", lists))[2]
    assert names == ["Alpha", "flat-coated_beta", "Gamma"]


def test_labels_may_number_the_breeds_in_another_order_than_their_names(tmp_path):
    lists = [
        (f"{name}_list.mat", layout.mat(files, 4 - layout.numbered(files)))
        for name, files in (("train", TRAIN), ("test", TEST))
    ]
    files, labels, names, _ = stanford_dogs.read_lists(layout.tar(tmp_path / "lists.tar", lists))
    assert names == ["Gamma", "flat-coated_beta", "Alpha"]
    assert all(names[label] in file for file, label in zip(files, labels, strict=True))


def test_breeds_that_differ_in_their_numbers_alone_keep_them(tmp_path):
    def renamed(files):
        return [f.replace("flat-coated_beta", "Alpha") for f in files]

    lists = [
        (f"{name}_list.mat", layout.mat(renamed(files), layout.numbered(files)))
        for name, files in (("train", TRAIN), ("test", TEST))
    ]
    names = stanford_dogs.read_lists(layout.tar(tmp_path / "lists.tar", lists))[2]
    assert names == ["n01-Alpha", "n02-Alpha", "n03-Gamma"]


@pytest.mark.parametrize("deflate", [False, True])
def test_mutated_lists_are_read_or_refused(deflate):
    content = layout.mat(TRAIN, LABELS, deflate=deflate)
    rng = np.random.default_rng(0)
    for _ in range(500):
        mutant = bytearray(content)
        for position in rng.integers(128, len(content), rng.integers(1, 4)):
            mutant[position] = rng.integers(256)
        with suppress(DataError):
            stanford_dogs.read_list(bytes(mutant))


def special(kind: bytes, target: str = "", name: str = "Images/n01-Alpha/n01_0.jpg"):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


def named(name: str, content: bytes = b"x", **fields):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    return member, content


ESCAPES = {
    "up": named("../escaped.jpg"),
    "up inside": named("Images/../../escaped.jpg"),
    "absolute": named("/tmp/escaped.jpg"),
    "symbolic link": special(tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": special(tarfile.LNKTYPE, "/etc/passwd"),
    "device": special(tarfile.CHRTYPE),
    "FIFO": special(tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("fault", ESCAPES)
def test_members_that_could_escape_are_refused(tmp_path, monkeypatch, fault):
    layout.write_archives(tmp_path / "dogs", images=[ESCAPES[fault], *layout.image_members()])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=r"images\.tar: .* (points out|is a link, a device)"):
        open_dataset(tmp_path / "dogs", 24)
    after = [p for p in sorted(tmp_path.rglob("*")) if "cache" not in p.parts[-3:]]
    assert [p for p in after if not p.is_relative_to(tmp_path / "cache")] == before
    assert not list((tmp_path / "cache").rglob("*.h5"))


@pytest.mark.parametrize("names", [("a//x", "a//x"), ("a/./x", "a/x")])
def test_a_member_is_no_other_by_another_spelling(tmp_path, names):
    path = layout.tar(tmp_path / "a.tar", [(name, b"x") for name in names])
    with pytest.raises(DataError, match="twice"):
        list(members(path))
    one = layout.tar(tmp_path / "b.tar", [(f"./{names[0]}", b"x")])  # as `tar -c .` names them
    assert list(members(one)) == [("a/x", b"x")]


def test_setuid_and_old_members_are_only_read(tmp_path):
    first, second, *rest = layout.image_members()
    images = [named(*first, mode=0o6777, uid=0), named(*second, type=tarfile.AREGTYPE), *rest]
    assert len(open_dataset(layout.write_archives(tmp_path / "d", images), 24).images) == 31


def test_tar_cut_anywhere_is_refused(tmp_path):
    path = layout.tar(tmp_path / "images.tar", layout.image_members())
    content = path.read_bytes()
    end = content.rindex(b"ustar") // 512 * 512  # the last header
    files = sorted(TRAIN + TEST)
    for cut in range(0, end + 513, 512):
        path.write_bytes(content[:cut])
        with pytest.raises(DataError, match=f"^{re.escape(str(path))}: "):
            list(stanford_dogs.pictures(path, files))


def test_bad_header_checksum_is_refused(tmp_path):
    path = layout.tar(tmp_path / "images.tar", layout.image_members())
    content = bytearray(path.read_bytes())
    position = [i for i in range(0, len(content), 512) if content[i + 257 : i + 262] == b"ustar"][9]
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="missing: 22 of 31"):
        list(stanford_dogs.pictures(path, sorted(TRAIN + TEST)))


def test_pictures_must_be_those_on_the_lists(tmp_path):
    images = layout.image_members()
    files = sorted(TRAIN + TEST)
    read = lambda contents: list(  # noqa: E731
        stanford_dogs.pictures(layout.tar(tmp_path / "images.tar", contents), files)
    )
    notes = [("Images/README", b"hello"), ("Images/.DS_Store", b"x")]
    notes += [("Images/n01-Alpha/._n01_0.jpg", b"x"), ("Images/.trash/n01_0.jpg", b"x")]
    assert len(read([*notes, *images])) == 31  # other files do not matter
    with pytest.raises(
        DataError, match=r"missing: 1 of 31; pictures on no list: 0: 'n01-Alpha/n01_0"
    ):
        read(images[1:])
    with pytest.raises(
        DataError, match=r"missing: 0 of 31; pictures on no list: 1: 'n09-Wolf/n09_1.JPG'"
    ):
        read([*images, ("Images/n09-Wolf/n09_1.JPG", b"")])
    with pytest.raises(DataError, match="9 of 31"):
        read([m for m in images if "n01" not in m[0]])
    with pytest.raises(DataError, match="twice"):
        read([*images, images[4]])


def header(
    size: int, kind: bytes = tarfile.REGTYPE, name: str = "Images/n01-Alpha/big.jpg"
) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def posix_sparse() -> bytes:
    """Four bytes that stand for nine, in a member that says it is a plain file."""
    member = tarfile.TarInfo("Images/n01-Alpha/a.jpg")
    member.size = 4
    member.pax_headers = {"GNU.sparse.map": "0,4", "GNU.sparse.size": "9"}
    return member.tobuf(tarfile.PAX_FORMAT) + bytes(512 + 1024)


BOMBS = {
    "8 GB picture": (header(8 << 30) + bytes(1 << 20), "has 8,589,934,592 bytes"),
    "8 GB of extended header": (header(8 << 30, tarfile.XHDTYPE) + bytes(1 << 20), "archive"),
    "8 GB of long name": (header(8 << 30, tarfile.GNUTYPE_LONGNAME) + bytes(1 << 20), "archive"),
    "negative size": (header(-512), "archive|bytes"),
    "sparse": (header(512, tarfile.GNUTYPE_SPARSE) + bytes(1024), "sparse"),
    "sparse, as POSIX has it": (posix_sparse(), "is a link, a device or sparse"),
    "extended header, deflated": (
        gzip.compress(header(1 << 30, tarfile.XHDTYPE) + bytes(80 << 20), 1),
        "takes more than 4 MiB",
    ),
}


@pytest.mark.parametrize("fault", BOMBS)
def test_tar_bombs_are_refused_in_little_memory(tmp_path, fault, monkeypatch):
    monkeypatch.setattr("minisimclr.data.archives.MAX_MEMBER_BYTES", 4 << 20)
    path = tmp_path / "images.tar"
    content, reason = BOMBS[fault]
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=reason):
            list(stanford_dogs.pictures(path, TRAIN))
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_too_many_members_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("minisimclr.data.archives.MAX_MEMBERS", 30)
    path = layout.tar(tmp_path / "images.tar", layout.image_members())
    with pytest.raises(DataError, match="more than 30 members"):
        list(members(path))


def test_an_archive_may_be_larger_than_a_member(tmp_path, monkeypatch):
    monkeypatch.setattr("minisimclr.data.archives.MAX_MEMBER_BYTES", 30_000)
    path = layout.tar(tmp_path / "images.tar", layout.image_members())
    assert path.stat().st_size > 30_000
    assert list(members(path)) == layout.image_members()


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_compressed_archives(tmp_path, mode):
    images = layout.image_members()
    path = layout.tar(tmp_path / "images.tar", images, mode)
    assert list(members(path)) == images
    layout.tar(path, [("large", b"".join(b"%d" % i for i in range(1 << 16)))], mode)
    content = path.read_bytes()
    damaged = [content[: len(content) // 2]]
    for place in (99, len(content) * 3 // 4):
        damaged.append(content[:place] + b"\xff" * 99 + content[place + 99 :])
    for each in damaged:
        path.write_bytes(each)
        with pytest.raises(DataError):
            list(stanford_dogs.pictures(path, sorted(TRAIN + TEST)))


def test_mutated_archives_are_read_or_refused(tmp_path):
    path = layout.tar(tmp_path / "images.tar", layout.image_members()[:3])
    content = path.read_bytes()
    headers = [i for i in range(0, len(content), 512) if content[i + 257 : i + 262] == b"ustar"]
    rng = np.random.default_rng(0)
    for _ in range(200):
        mutant = bytearray(content)
        begin = rng.choice(headers)
        mutant[begin + rng.integers(512)] = rng.integers(256)
        checksum = sum(mutant[begin : begin + 148]) + 256 + sum(mutant[begin + 156 : begin + 512])
        mutant[begin + 148 : begin + 156] = b"%06o\0 " % checksum
        path.write_bytes(mutant)
        with suppress(DataError):
            list(members(path))


BAD_BOXES = {
    "none": layout.annotation(boxes=()),
    "narrow": layout.annotation(boxes=((5, 5, 5, 9),)),
    "flat": layout.annotation(boxes=((5, 5, 9, 5),)),
    "no size": layout.annotation().replace(b"width", b"weight"),
    "bomb": b'<!DOCTYPE a [<!ENTITY x "&x;&x;">]><annotation>&x;</annotation>',
    "not XML": b"\xff\xfe",
}


@pytest.mark.parametrize("fault", BAD_BOXES)
def test_bad_annotation_is_refused(tmp_path, fault):
    good = [(f"Annotation/{name[:-4]}", layout.annotation()) for name in TRAIN[1:]]
    path = layout.tar(
        tmp_path / "a.tar", [*good, (f"Annotation/{TRAIN[0][:-4]}", BAD_BOXES[fault])]
    )
    with pytest.raises(DataError, match=r"pictures without a box: 1, .*n01_0"):
        stanford_dogs.read_boxes(path, TRAIN)


def test_largest_of_several_boxes(tmp_path):
    others = (1, 1, 5, 5), (2, 25, 39, 29), (10, 1, 39, 9), (36, 1, 39, 29)  # smaller, longer
    others += ((1, 1, 39, 10),)  # all round, too
    content = layout.annotation(boxes=(*others[:2], (3, 4, 30, 20), *others[2:]))
    path = layout.tar(tmp_path / "a.tar", [(f"Annotation/{TRAIN[0][:-4]}", content)])
    assert stanford_dogs.read_boxes(path, TRAIN[:1]) == {TRAIN[0]: (3, 4, 30, 20, 40, 30)}


def test_real_annotation(test_data):
    path = test_data / "stanford-dogs-80px/annotation-pug.tar.gz"
    files = [f"{n.partition('/')[2]}.jpg" for n, _ in members(path)]
    boxes = stanford_dogs.read_boxes(path, files)
    assert len(boxes) == 200
    assert boxes["n02110958-pug/n02110958_5834.jpg"] == (170, 247, 311, 387, 375, 500)


@pytest.mark.parametrize("name", ["images", "lists"])
def test_folder_with_half_of_the_layout(tmp_path, name):
    layout.tar(tmp_path / f"{name}.tar", [])
    with pytest.raises(DataError, match=r"both images\.tar and lists\.tar"):
        open_dataset(tmp_path)
    (tmp_path / f"{name}-80px.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match="keep one"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("packed", [[], ["images"], ["lists"], ["images", "annotation"]])
def test_archives_may_be_unpacked(dogs, tmp_path, monkeypatch, packed):
    """The same pictures, lists and boxes; hidden files do not count."""
    root = tmp_path / "unpacked"
    for name in ("images", "lists", "annotation"):
        with tarfile.open(dogs / f"{name}.tar") as archive:
            archive.extractall(root, filter="data")
    for name in packed:
        shutil.copy(dogs / f"{name}.tar", root)
        shutil.rmtree(root / name.capitalize(), ignore_errors=True)
    if not packed:
        (root / "Images" / layout.BREEDS[0] / "._1.jpg").write_bytes(b"from another system")
        (root / "Images" / ".ipynb_checkpoints").mkdir()
        (root / "Images" / ".ipynb_checkpoints" / "1.jpg").write_bytes(b"of a notebook")
    for name in packed:
        (root / f"{name}.tar.md5").touch()
    boxes = Options(crop="boxes")
    whole = prepare(root, 24, boxes)
    assert whole.fingerprint == prepare(dogs, 24, boxes).fingerprint
    assert whole.splits.tolist() == prepare(dogs, 24, boxes).splits.tolist()
    monkeypatch.chdir(root)
    assert prepare(".", 24, boxes).recipe == whole.recipe
    changed = next(root.glob("*_list.mat" if "images" in packed else "Images/*/*0.jpg"))
    os.utime(changed, (9, 9))
    before, notes = prepare(root, 24, boxes).recipe, next(root.glob("Annotation/*/*"), None)
    assert before != whole.recipe
    os.utime(notes or root / "annotation.tar", (9, 9))
    assert prepare(root, 24, boxes).recipe != before


def test_an_unpacked_picture_that_cannot_be_had(dogs, tmp_path, monkeypatch):
    with tarfile.open(dogs / "images.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    shutil.copy(dogs / "lists.tar", tmp_path)
    picture = tmp_path / "Images" / sorted(TRAIN + TEST)[0]

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(type(picture), "read_bytes", refuse)
        with pytest.raises(DataError, match=r"n01_0\.jpg: cannot be read \(Permission denied"):
            open_dataset(tmp_path, 24)
    picture.unlink()
    with pytest.raises(DataError, match="missing: 1 of 31; pictures on no list: 0: 'n01-Alpha"):
        open_dataset(tmp_path, 24)


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege")
def test_a_broken_link_is_no_archive(tmp_path):
    (tmp_path / "lists.tar").write_bytes(b"x")
    (tmp_path / "images.tar").symlink_to(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"images\.tar: cannot be read \(No such file"):
        open_dataset(tmp_path, 16)


def test_all_archives_must_be_the_official_ones_to_be_verified(dogs, tmp_path, monkeypatch):
    archives = stanford_dogs.in_folder(dogs)
    right = stanford_dogs.OFFICIAL["images"][0], stanford_dogs.file_sha256(archives["images"])
    monkeypatch.setitem(stanford_dogs.OFFICIAL, "images", right)
    made = stanford_dogs.official(archives, Options(), tmp_path, allow_unverified=True)
    assert made.plan().notes == {"verified": False}


def test_a_class_may_be_called_images(tmp_path):
    """Without lists, it is a folder of folders; lists alone are no reason to refuse one either."""
    for name in ("Images/deep/1.png", "Others/deep/2.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_bytes(layout.picture(0, kind="PNG"))
    assert open_dataset(tmp_path, 24).class_names == ("Images", "Others")
    (tmp_path / "Images").rename(tmp_path / "More")
    (tmp_path / "train_list.mat").write_bytes(b"of another kind")
    assert open_dataset(tmp_path, 24).class_names == ("More", "Others")


def test_boxes_without_annotation(tmp_path):
    layout.write_archives(tmp_path)
    (tmp_path / "annotation.tar").unlink()
    with pytest.raises(DataError, match=r"needs annotation\.tar"):
        prepare(tmp_path, 24, Options(crop="boxes"))


def test_what_to_type_for_another_size_has_the_options_of_the_first(dogs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    archives, chosen = stanford_dogs.in_folder(dogs), Options("boxes", True, 1)
    prepare("stanford-dogs", 24, chosen, archives=archives, allow_unverified=True)
    line = "prepare stanford-dogs --image-size {} --crop boxes --skip-bad --labels-per-class 1`$"
    with pytest.raises(DataError, match=line.format(20)):
        open_dataset("stanford-dogs", 20)
    monkeypatch.setitem(data.DECODER, "pillow", "0")
    with pytest.raises(DataError, match=line.format(24)):
        open_dataset("stanford-dogs", 24)


def test_boxes_are_for_crops_of_boxes(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["data", "prepare", "stanford-dogs", "--annotation-tar", str(tmp_path / "a.tar")])
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: --annotation-tar goes with --crop boxes\n"


def test_a_damaged_cache_is_not_offered_in_its_own_place(dogs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    archives = stanford_dogs.in_folder(dogs)
    path = prepare("stanford-dogs", 16, archives=archives, allow_unverified=True).path
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"with 16 px: run .*16` \(with --crop boxes"):
        open_dataset("stanford-dogs", 16)


def test_a_cache_made_by_another_filter_is_not_taken(dogs, tmp_path, monkeypatch):
    archives = stanford_dogs.in_folder(dogs)
    prepare("stanford-dogs", 16, archives=archives, allow_unverified=True)
    assert len(open_dataset("stanford-dogs", 16).images) == 31
    monkeypatch.setitem(data.DECODER, "filter", "of a later version")
    with pytest.raises(DataError, match="is not prepared with 16 px"):
        open_dataset("stanford-dogs", 16)


def test_official_name_wants_official_archives(dogs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    archives = stanford_dogs.in_folder(dogs)
    with pytest.raises(DataError, match=r"minisimclr data prepare stanford-dogs --image-size 24"):
        open_dataset("stanford-dogs", 24)
    with pytest.raises(DataError, match=r"images\.tar: is not the official images\.tar"):
        prepare("stanford-dogs", 24, archives=archives)
    dataset = prepare("stanford-dogs", 24, archives=archives, allow_unverified=True)
    assert dataset.name == "stanford-dogs" and dataset.notes["verified"] is False
    assert open_dataset("stanford-dogs", 24).fingerprint == dataset.fingerprint
    assert prepared("stanford-dogs", 24).fingerprint == dataset.fingerprint
    recipes = [dataset.recipe["source"]]
    for name, contents in (("images", layout.image_members()), ("lists", layout.list_members())):
        other = archives | {name: layout.tar(tmp_path / f"{name}.tar", contents[::-1])}
        made = prepare("stanford-dogs", 16, archives=other, allow_unverified=True)
        assert made.recipe["source"] not in recipes
        recipes.append(made.recipe["source"])
        del made  # Windows replaces no cache that is open
    with pytest.raises(DataError, match=r"with 20 px, only as stanford-dogs-16px\.h5: run"):
        open_dataset("stanford-dogs", 20)
    with pytest.raises(DataError, match="is not the official"):  # named, they are not passed over
        prepare("stanford-dogs", 24, archives=archives)
    with monkeypatch.context() as patch:
        patch.setitem(data.DECODER, "pillow", "0")
        with pytest.raises(DataError, match=r"with 24 px and this Pillow: run .*`$"):
            open_dataset("stanford-dogs", 24)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
        with pytest.raises(DataError, match=r"with 80 px: run .*80` \(with --crop boxes for the"):
            open_dataset("stanford-dogs")
    hashes = {n: (p.stat().st_size, stanford_dogs.file_sha256(p)) for n, p in archives.items()}
    monkeypatch.setattr(stanford_dogs, "OFFICIAL", hashes)
    assert prepare("stanford-dogs", 20, archives=archives).notes["verified"] is True
    with pytest.raises(DataError, match="cannot be read"):
        prepare("stanford-dogs", 16, archives={"images": tmp_path / "none", "lists": tmp_path})
    box = layout.annotation(boxes=((9, 3, 29, 23),))
    notes = [(f"Annotation/{n[:-4]}", box) for n in TRAIN + TEST]
    moved = archives | {"annotation": layout.tar(tmp_path / "annotation.tar", notes)}
    cropped = {
        prepare("stanford-dogs", 12, Options("boxes"), None, each, None, True).fingerprint
        for each in (archives, moved)
    }
    assert len(cropped) == 2  # of other boxes


def test_archives_may_be_named_on_the_command_line(dogs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(stanford_dogs, "URL", "http://localhost:9/")  # nobody answers
    named = [w for n, p in stanford_dogs.in_folder(dogs).items() for w in (f"--{n}-tar", str(p))]
    sizes = "--image-size", "24", "--crop", "boxes", "--allow-unverified"
    with pytest.raises(SystemExit) as exit:
        main(["data", "prepare", "stanford-dogs", *sizes, *named])
    assert exit.value.code == 0 and open_dataset("stanford-dogs", 24).options.crop == "boxes"
