"""The cache is whole or absent: killed, raced, out of space, damaged, forged, outdated."""

import errno
import hashlib
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from unittest.mock import Mock

import h5py
import numpy as np
import pytest
from PIL import Image

from minisimclr import data
from minisimclr.cli import main
from minisimclr.data import Options, cache, open_dataset, prepare, prepared, workers
from minisimclr.data.workers import parallel_map
from minisimclr.errors import ConfigError, DataError, OutputError

KILLS = 20  # moments at which a build is killed


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg/minisimclr"


@pytest.fixture(scope="module")
def made(pictures, tmp_path_factory) -> Path:
    """A valid cache, to be copied."""
    return prepare(pictures, 16).path


def child(*arguments, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # a disk that is full would keep half a module
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def test_what_is_stored_is_what_was_decoded(pictures, home):
    dataset = open_dataset(pictures, np.int64(20))
    assert dataset.images.dtype == np.uint8 and not dataset.images.flags.writeable
    assert dataset.labels.dtype == dataset.split("test").dtype == np.int64
    for row in (0, 57, 119):
        file = np.asarray(Image.open(pictures / dataset.file_names[row]))
        np.testing.assert_array_equal(dataset.images[row], file)
    np.testing.assert_array_equal(dataset.images[[5, 3]][1], dataset.images[3])
    with h5py.File(dataset.path) as file:  # any HDF5 program can read it
        np.testing.assert_array_equal(file["images"][:], dataset.images)
        assert file["images"].chunks is None
        np.testing.assert_array_equal(file["labels"][:], dataset.labels)
    digests = [hashlib.sha256(pixels.tobytes()).digest() for pixels in dataset.images]
    assert dataset.fingerprint == hashlib.sha256(b"".join(digests)).hexdigest()
    assert dataset.path.parent == home


def test_reuse_and_reasons_to_build_again(pictures, home, monkeypatch, tmp_path):
    builds = []
    build = cache.build
    monkeypatch.setattr(cache, "build", lambda *a: (builds.append(a), build(*a)))
    source = shutil.copytree(pictures, tmp_path / "source")
    open_dataset(source, 16)
    open_dataset(source, 16)
    assert len(builds) == 1
    open_dataset(source, 18)
    assert len(builds) == 2  # another size has a cache of its own
    os.utime(source / "blob/00.png", (0, 0))
    open_dataset(source, 16)
    assert len(builds) == 3
    (source / "blob/01.png").unlink()
    assert len(open_dataset(source, 16).images) == 119 and len(builds) == 4
    (source / "blob/02.png").rename(source / "blob/02a.png")
    assert open_dataset(source, 16).file_names[1] == "blob/02a.png"
    file, before = source / "blob/03.png", (source / "blob/03.png").stat()
    file.write_bytes(file.read_bytes() + b"x")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    monkeypatch.chdir(source)
    assert open_dataset(".", 16).name == "source" and len(builds) == 6
    open_dataset(source, 16)
    assert len(builds) == 6
    del builds[4:]
    monkeypatch.setitem(data.DECODER, "filter", "other")
    open_dataset(source, 16)
    assert len(builds) == 5
    monkeypatch.setitem(data.DECODER, "pillow", "0")
    open_dataset(source, 16)
    assert len(builds) == 6
    monkeypatch.setattr(data.toydogs, "VERSION", 0)
    monkeypatch.setattr(data.toydogs, "SPLIT_SIZES", {"pretrain": 3, "labelled": 2, "test": 1})
    assert open_dataset("toydogs", 16).splits.tolist() == [0, 0, 0, 1, 1, 2]
    assert len(builds) == 7


def test_a_new_version_of_the_cartoons_is_drawn(home, monkeypatch):
    monkeypatch.setattr(data.toydogs, "SPLIT_SIZES", {"pretrain": 3, "labelled": 2, "test": 1})
    builds, build = [], cache.build
    monkeypatch.setattr(cache, "build", lambda *a: (builds.append(a), build(*a)))
    for version in (2, 2, 3):
        monkeypatch.setattr(data.toydogs, "VERSION", version)
        open_dataset("toydogs", 16)
    assert len(builds) == 2


def test_format_of_another_version_is_refused_and_replaced(pictures, home, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cache, "FORMAT", "minisimclr cache 0")
        path = prepare(pictures, 16).path
    with pytest.raises(DataError, match="is 'minisimclr cache 0', not"):
        cache.load(path)
    with pytest.warns(UserWarning, match="made anew with the usual options"):
        assert open_dataset(pictures, 16).path == path


def test_a_cache_that_cannot_be_used_is_made_anew_with_the_options_of_another_size(pictures, home):
    prepare(pictures, 20, Options(labels_per_class=3))
    made = prepare(pictures, 16, Options(labels_per_class=3))
    splits, path = made.splits, made.path
    del made  # Windows replaces no file that is open
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="made anew with --labels-per-class 3$"):
        assert (open_dataset(pictures, 16).splits == splits).all()


def test_a_cache_that_may_not_be_read_is_not_called_damaged(made, tmp_path, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"cache\.h5: cannot be read \(Permission denied\)"):
        cache.load(tmp_path / "cache.h5")


def test_workers_make_the_same_cache(pictures, home, monkeypatch):
    path = prepare(pictures, 16).path
    content = path.read_bytes()
    path.unlink()
    monkeypatch.setattr(cache, "PER_WORKER", 40)
    monkeypatch.setattr(cache, "available_cores", lambda: 3)
    begin, started = workers.start, []
    monkeypatch.setattr(workers, "start", lambda: started.append(begin()) or started[-1])
    assert prepare(pictures, 16).path.read_bytes() == content
    assert len(started) == 3


@pytest.mark.parametrize("cores, each, expected", [(2, 30, 2), (9, 40, 3), (9, 121, 0)])
def test_workers_are_as_many_as_cores_and_work_allow(
    cores, each, expected, pictures, home, monkeypatch
):
    asked = []
    monkeypatch.setattr(cache, "available_cores", lambda: cores)
    monkeypatch.setattr(cache, "PER_WORKER", each)
    monkeypatch.setattr(cache, "parallel_map", lambda f, x, n: asked.append(n) or map(f, x))
    prepare(pictures, 16)
    assert asked == [expected]


def test_progress_reaches_the_end(pictures, home):
    calls = []
    open_dataset(pictures, 16, progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls) and calls[-1] == (120, 120) and len(calls) > 2


def test_duplicates_are_reported(home, tmp_path):
    for i, shade in enumerate((0, 9, 0, 0, 9, 77)):
        Image.new("RGB", (20, 20), (shade, 0, 0)).save(tmp_path / f"{i}.png")
    assert prepare(tmp_path, 16).duplicate_of.tolist() == [0, 1, 0, 0, 1, 5]


# Interrupted and racing builds. One process forks children that build in no time, so that a kill
# can strike anywhere.

KILLER = """
import json, os, pathlib, random, signal, sys, time
from minisimclr.data import cache, prepare
from minisimclr.errors import DataError
source, kills, cores = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
cache.available_cores, cache.PER_WORKER = lambda: cores, 30
path = prepare(source, 32).path
counts = {"absent": 0, "valid": 0, "invalid": 0}
def build():
    path.unlink(missing_ok=True)
    begin = time.perf_counter()
    pid = os.fork()
    if not pid:
        try:
            prepare(source, 32)
        finally:
            os._exit(0)
    return pid, begin
pid, begin = build()
os.waitpid(pid, 0)
whole = time.perf_counter() - begin
for i in range(kills):
    pid, begin = build()
    time.sleep(random.Random(i).uniform(0, 1.1 * whole))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    try:
        cache.load(path).verify()
        counts["valid"] += 1
    except DataError:
        counts["invalid" if path.exists() else "absent"] += 1
prepare(source, 32).verify()
left = [p.name for p in path.parent.iterdir() if p != path and not p.name.endswith(".lock")]
print(json.dumps(counts | {"left": left}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_builds_leave_no_cache_or_a_valid_one(pictures, home):
    result = json.loads(child("-c", KILLER, pictures, KILLS, 1).stdout)
    assert result["invalid"] == 0
    assert result["absent"] > 0
    assert result["absent"] + result["valid"] == KILLS
    assert result["left"] == []  # the next builder has removed what the dead ones left


SLOW = """
import sys, time
from minisimclr.data.workers import parallel_map
def make(path):
    print("begun\\n", end="", flush=True)  # in one piece, beside the other's
    time.sleep(15)
    open(path, "w")
if __name__ == "__main__":
    sys.modules["slow"] = sys.modules["__main__"]
    make.__module__ = "slow"
    list(parallel_map(make, sys.argv[1:], 2))
"""


@pytest.mark.skipif(os.name == "nt", reason="has no such signal")
def test_workers_of_a_killed_parent_make_nothing_more(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    words = [sys.executable, tmp_path / "slow.py", tmp_path / "a", tmp_path / "b"]
    parent = subprocess.Popen(words, stderr=subprocess.PIPE)
    assert [parent.stderr.readline() for _ in range(2)] == 2 * [b"begun\n"]
    parent.kill()
    assert parent.communicate()[1] == b""  # which waits for the workers' end, too
    assert sorted(path.name for path in tmp_path.iterdir()) == ["slow.py"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_workers_end_with_their_killed_parent(pictures, home):
    result = json.loads(child("-c", KILLER, pictures, 3, 2).stdout)  # communicate() waits for pipes
    assert result["invalid"] == 0 and result["left"] == []


RACER = """
import sys
from minisimclr.data import cache, prepare
build, built = cache.build, []
cache.build = lambda *a: (built.append(1), build(*a))
sys.stdin.readline()
dataset = prepare(sys.argv[1], 64)
dataset.verify()
print(len(built), dataset.fingerprint)
"""


def test_of_four_racing_builders_one_builds(pictures, home):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipe = subprocess.PIPE
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, pictures], stdin=pipe, stdout=pipe, env=environment
        )
        for _ in range(4)
    ]
    for racer in racers:
        racer.stdin.write(b"\n")
        racer.stdin.flush()
    answers = sorted(racer.communicate()[0].split() for racer in racers)
    assert [built for built, _ in answers] == [b"0", b"0", b"0", b"1"]
    assert len({fingerprint for _, fingerprint in answers}) == 1


# Where the disk does not play along.


def limited(limit: int):
    resource = pytest.importorskip("resource", reason="no limits of that kind here")
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@pytest.mark.parametrize("limit", [100, 50_000])
def test_full_disk_ends_with_code_4(pictures, home, limit):
    result = child(
        "-m",
        "minisimclr",
        "data",
        "prepare",
        pictures,
        "--image-size",
        32,
        preexec_fn=limited(limit),
    )
    assert result.returncode == 4
    assert result.stderr.count("\n") == 1 and "the cache needs 368,640 bytes" in result.stderr
    assert [p.name for p in home.iterdir() if not p.name.endswith(".lock")] == []


def test_too_many_processes_have_a_way_out(pictures, monkeypatch):
    refused = BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
    monkeypatch.setattr(cache, "parallel_map", Mock(side_effect=refused))
    with pytest.raises(OutputError, match=r"unavailable \(allow more processes: ulimit -u\)"):
        prepare(pictures, 9)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_what_has_to_do_with_space_is_said_to(code, pictures, home, monkeypatch):
    monkeypatch.setattr(cache, "fill", Mock(side_effect=OSError(code, os.strerror(code))))
    with pytest.raises(OutputError, match="the cache needs 92,160 bytes"):
        prepare(pictures, 16)


def test_what_has_nothing_to_do_with_space_is_not_said_to(pictures, home, monkeypatch):
    monkeypatch.setattr(cache, "fill", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OutputError, match=r"16px\.h5: Input/output error$"):
        open_dataset(pictures, 16)


def test_workers_do_without_large_pipes_where_these_are_used_up(monkeypatch):
    """As on a machine of 32 cores, whose user may have 64 MiB of them."""
    refuse = Mock(side_effect=PermissionError(errno.EPERM, "Operation not permitted"))
    monkeypatch.setattr(workers, "fcntl", Mock(fcntl=refuse, F_SETPIPE_SZ=1031))
    assert list(parallel_map(abs, range(-3, 0), 2)) == [3, 2, 1]
    assert refuse.call_count == 4
    monkeypatch.setattr(workers, "fcntl", None)  # Windows
    assert list(parallel_map(abs, range(-3, 0), 2)) == [3, 2, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_a_worker_s_pipes_are_large(monkeypatch):
    process = workers.start()
    try:
        sizes = [workers.fcntl.fcntl(pipe, 1032) for pipe in (process.stdin, process.stdout)]
    finally:
        process.communicate()
    assert sizes == [workers.ANSWER] * 2


def test_too_little_space_is_found_before_the_work(pictures, home, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(9, 8, 1000))
    calls = []
    with pytest.raises(OutputError, match=r"No space left .* needs 92,160 bytes, 1,000 are free"):
        open_dataset(pictures, 16, lambda *a: calls.append(a))
    assert calls == []


def rows_opened_by(function, monkeypatch):
    """Let `function`(path, mode) open the file whenever pixels are written to it."""
    usual = Path.open

    def opened(path, mode="r", *rest, **options):
        special = mode == "r+b"
        return (function if special else usual)(path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", opened)


@pytest.mark.parametrize("fault", ["row", "header", "fsync", "replace"])
def test_failing_disk(pictures, home, monkeypatch, fault):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if fault == "row":
        rows_opened_by(fail, monkeypatch)
    elif fault == "header":
        monkeypatch.setattr(cache, "first_line", fail)
    elif fault == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OutputError, match="Input/output error"):
        open_dataset(pictures, 16)
    assert [p.name for p in home.iterdir() if not p.name.endswith(".lock")] == []


def test_short_and_interrupted_writes_go_on(pictures, made, home, monkeypatch):
    class Moody(io.FileIO):
        calls = 0

        def write(self, content):
            Moody.calls += 1
            if Moody.calls % 3 == 0:
                raise InterruptedError(errno.EINTR, "interrupted")
            return super().write(content[: len(content) // 2 + 1])

    def moody(path, mode, buffering=-1):
        raw = Moody(path, mode)
        return io.BufferedRandom(raw) if buffering else raw

    rows_opened_by(moody, monkeypatch)
    assert prepare(pictures, 16).path.read_bytes() == made.read_bytes()
    assert Moody.calls > 240


def test_cache_folder_that_cannot_be_written(pictures, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file/below"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(place))
        with pytest.raises(SystemExit) as exit:
            main(["data", "prepare", str(pictures)])
        assert exit.value.code == 4
        said = capsys.readouterr().err
        assert said.startswith(f"error: {place / 'minisimclr'} cannot be made (")
        assert said.endswith("): name another folder in XDG_CACHE_HOME\n")


def test_read_only_cache_folder(pictures, home, monkeypatch):
    path = open_dataset(pictures, 16).path
    for lock in home.glob(".*"):
        lock.unlink()
    home.chmod(0o555)
    try:
        assert open_dataset(pictures, 16).path == path
        assert list(home.iterdir()) == [path]  # nothing was even tried
    finally:
        home.chmod(0o755)


def test_folder_of_caches_is_made_where_links_and_parents_are_missing(
    pictures, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not/yet/there"))
    assert open_dataset(pictures, 16).path.is_relative_to(tmp_path / "not/yet/there")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("USERPROFILE" if os.name == "nt" else "HOME", str(tmp_path))
    assert data.cache_folder() == tmp_path / ".cache/minisimclr"


# Damage, forgery, replacement.

DAMAGE = {
    "empty": lambda content: b"",
    "text": lambda content: b"hello\n" * 2000,
    "JSON": lambda content: b"[1, 2]",
    "first block only": lambda content: content[:4096],
    "cut in the header": lambda content: content[:5000],
    "cut in the pixels": lambda content: content[:-1],
    "longer": lambda content: content + b"x",
    "an older HDF5 file": lambda content: content[4096:],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_cache_is_never_read_and_built_again(made, pictures, home, kind, capsys):
    path, _ = data.cache_path(pictures, 16)
    home.mkdir(parents=True)
    path.write_bytes(DAMAGE[kind](made.read_bytes()))
    for command in ("verify", "info"):
        with pytest.raises(SystemExit) as exit:
            main(["data", command, str(pictures), "--image-size", "16"])
        assert exit.value.code == 3
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.warns(UserWarning, match="cannot be used; it is made anew"):
        open_dataset(pictures, 16).verify()


def test_every_flipped_byte_is_found(made, tmp_path):
    content = made.read_bytes()
    start = json.loads(content[:4096])["start"]
    rng = np.random.default_rng(0)
    places = np.concatenate([rng.integers(0, 4096, 60), rng.integers(4096, start, 70),
                             rng.integers(start, len(content), 70)])  # fmt: skip
    path = tmp_path / "cache.h5"
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        if place < start:  # found on opening
            with pytest.raises(DataError):
                cache.load(path)
        else:
            dataset = cache.load(path)
            with pytest.raises(
                DataError, match=r"pixels changed .* `minisimclr data prepare NAME --image-size 16`"
            ):
                dataset.verify()
            del dataset  # Windows writes to no file that is open


def test_verify_says_3_for_changed_pixels(pictures, home, capsys):
    path = open_dataset(pictures, 16).path
    capsys.readouterr()
    main_code(["data", "verify", str(path), "--json"], 0)
    said = {"path": str(path), "sha256": cache.load(path).fingerprint, "valid": True}
    assert json.loads(capsys.readouterr().out) == said
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    main_code(["data", "verify", str(path)], 3)
    assert "pixels changed" in capsys.readouterr().err


def main_code(arguments, code):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == code


def forge(path: Path, change) -> Path:
    """A cache whose hashes are right and whose HDF5 part `change`(file) has written."""
    with h5py.File(path, "w", userblock_size=4096, meta_block_size=1 << 16) as file:
        change(file)
    content = path.read_bytes()[4096:]
    with h5py.File(path, "r") as file:
        images = file.get("images")
        start = images.id.get_offset() if isinstance(images, h5py.Dataset) else None
    start = start or 4096 + len(content)
    header, pixels = content[: start - 4096], content[start - 4096 :]
    line = cache.first_line(start, header, cache.sha256(pixels))  # none that `verify` would take
    path.write_bytes(line + content)
    return path


ABOUT = {
    "name": "forged",
    "recipe": {"size": 8, "options": {}},
    "notes": {},
    "class_names": ["a"],
    "file_names": ["x", "y"],
}
LATER = json.dumps(ABOUT | {"recipe": {"size": 8, "options": {"nope": 1}}}).encode()


def about(**other):
    return np.frombuffer(json.dumps(ABOUT | other).encode(), np.uint8)


def good(file, **other):
    arrays = {
        "labels": np.zeros(2, np.int64),
        "splits": np.zeros(2, np.uint8),
        "duplicate_of": np.arange(2),
        "about": np.frombuffer(json.dumps(ABOUT).encode(), np.uint8),
        "images": np.zeros((2, 8, 8, 3), np.uint8),
    }
    for name, array in (arrays | other).items():
        if array is not None:
            file[name] = array


def external(file):
    good(file, labels=None)
    file.create_dataset("labels", (2,), "u1", external=[("/etc/hostname", 0, 2)])


def external_images(file):
    good(file, images=None)
    file.create_dataset("images", (2, 8, 8, 3), "u1", external=[("/etc/passwd", 0, 384)])


def virtual(file):
    good(file, labels=None)
    layout = h5py.VirtualLayout((2,), "i8")
    layout[:] = h5py.VirtualSource("/tmp/other.h5", "x", (2,))
    file.create_virtual_dataset("labels", layout)


def bomb(file):
    good(file, about=None)
    file.create_dataset("about", (1 << 50,), "u1", chunks=(1 << 20,))


def declared(file):
    good(file, labels=None)
    space = h5py.h5s.create_simple((1 << 20,))
    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)  # its place is in the file
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    h5py.h5d.create(file.id, b"labels", h5py.h5t.STD_U8LE, space, early)


HALF = {"size": 8, "options": {"labels_per_class": 1.5}}
FORGED = {
    "external file": external,
    "external pixels": external_images,
    "virtual": virtual,
    "chunked bomb": bomb,
    "declared bomb": declared,
    "soft link": lambda f: good(f, labels=h5py.SoftLink("/splits")),
    "external link": lambda f: good(f, labels=h5py.ExternalLink("/tmp/other.h5", "x")),
    "group": lambda f: (good(f, labels=None), f.create_group("labels")),
    "strings": lambda f: good(f, labels=np.array([b"a", b"b"])),
    "floats": lambda f: good(f, labels=np.zeros(2)),
    "missing": lambda f: good(f, splits=None),
    "short": lambda f: good(f, labels=np.zeros(1, np.int64)),
    "label of no class": lambda f: good(f, labels=np.array([0, 1])),
    "label below none": lambda f: good(f, labels=np.array([0, -2])),
    "duplicate of no picture": lambda f: good(f, duplicate_of=np.array([0, 2])),
    "duplicate of less": lambda f: good(f, duplicate_of=np.array([0, -1])),
    "notes in a list": lambda f: good(f, about=about(notes=[])),
    "a class without a name": lambda f: good(f, about=about(class_names=[None])),
    "a file whose name is a number": lambda f: good(f, about=about(file_names=["x", 1])),
    "labels in a table": lambda f: good(f, labels=np.zeros((2, 2), np.int64)),
    "splits in a table": lambda f: good(f, splits=np.zeros((2, 1), np.uint8)),
    "split below the first": lambda f: good(f, splits=np.array([0, -1], np.int8)),
    "a name too few": lambda f: good(f, about=about(file_names=["x"])),
    "a name in a list": lambda f: good(f, about=about(name=[1])),
    "half a label": lambda f: good(f, about=about(recipe=HALF)),
    "split of no name": lambda f: good(f, splits=np.array([0, 3], np.uint8)),
    "other shape": lambda f: good(f, images=np.zeros((2, 8, 3, 8), np.uint8)),
    "16 bit": lambda f: good(f, images=np.zeros((2, 8, 8, 3), np.uint16)),
    "not JSON": lambda f: good(f, about=np.zeros(9, np.uint8)),
    "option of a later version": lambda f: good(f, about=np.frombuffer(LATER, np.uint8)),
    "no names": lambda f: good(f, about=np.frombuffer(b'{"recipe": {"size": 8}}', np.uint8)),
}


def test_forgery_that_changes_nothing_is_accepted(tmp_path):
    assert cache.load(forge(tmp_path / "cache.h5", good)).name == "forged"


@pytest.mark.parametrize("kind", FORGED)
def test_forged_cache_is_refused(tmp_path, kind):
    structural = list(FORGED).index(kind) < list(FORGED).index("short")
    reason = "is not stored as one array" if structural else "fit together|should be|no cache, or"
    with pytest.raises(DataError, match=reason):
        cache.load(forge(tmp_path / "cache.h5", FORGED[kind]))


def test_a_cache_whose_pixels_are_elsewhere_is_refused(tmp_path):
    path = forge(tmp_path / "cache.h5", good)
    content = path.read_bytes()[4096:] + bytes(384)  # as large as its pixels
    start, header = 4096 + len(content) - 384, content[:-384]
    line = cache.first_line(start, header, cache.sha256(bytes(384)))
    path.write_bytes(line + content)
    with pytest.raises(DataError, match="its pixels are not where they should be"):
        cache.load(path)


@pytest.mark.skipif(os.name == "nt", reason="Windows replaces no file that is open")
def test_cache_replaced_while_open(pictures, home, tmp_path):
    pictures = shutil.copytree(pictures, tmp_path / "source")
    dataset = open_dataset(pictures, 16)
    shutil.copy(pictures / "blob" / "01.png", pictures / "blob" / "00.png")
    before = np.array(dataset.images)
    fingerprint = dataset.fingerprint
    other = prepare(pictures, 16, data.Options(labels_per_class=3))
    assert other.path == dataset.path and other.recipe != dataset.recipe
    np.testing.assert_array_equal(dataset.images, before)
    dataset.verify()
    assert dataset.fingerprint == fingerprint


def test_cache_file_by_path(pictures, home, tmp_path):
    path = shutil.copy(open_dataset(pictures, 16).path, tmp_path / "own.h5")
    dataset = open_dataset(path)
    assert dataset.images.shape == (120, 16, 16, 3)
    assert prepared(path).fingerprint == dataset.fingerprint == prepare(path).fingerprint
    with pytest.raises(ConfigError, match=r"own\.h5 is a finished cache and has a size"):
        prepared(path, 16)
    with pytest.warns(UserWarning, match="16 px where 22 are wanted: they are enlarged"):
        open_dataset(path, 22)
    for size in (8, 20):  # 20 for views of 16
        assert open_dataset(path, size).fingerprint == dataset.fingerprint


def test_a_cache_file_named_like_one_in_the_cache_folder_is_the_one_meant(pictures, home, tmp_path):
    there = open_dataset(pictures, 16).path
    content = bytearray(there.read_bytes())
    content[-1] ^= 1
    (tmp_path / there.name).write_bytes(content)
    assert prepared(tmp_path / there.name).path == tmp_path / there.name
    with pytest.raises(DataError, match="changed on the disk"):
        prepared(tmp_path / there.name).verify()
    open_dataset(pictures, 20)
    assert prepared(there).images.shape[1] == 16  # nor is it the size made last


# Workers.


def group_of(_):
    return os.getpgrp()


def double(x):
    return 2 * x


def die(x):
    os._exit(7)


def leave(x):
    sys.exit("in the midst of it")


def make_what_cannot_be_sent(x):
    return lambda: x


def run_out_of_memory(x):
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(x):
    raise DataError("refused")


def divide(x):
    return x / 0


def make_slowly(path):
    time.sleep(0 if path.name == "0" else 15)
    path.touch()


def chatter(x):
    print("to standard output", x)
    return x


@pytest.mark.parametrize("count", [0, 1])
def test_one_worker_is_this_process(count, monkeypatch):
    monkeypatch.setattr(workers, "start", lambda: pytest.fail("a process was started"))
    assert list(parallel_map(abs, [-1, 2], count)) == [1, 2]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_parallel_map_keeps_order(workers):
    assert list(parallel_map(double, range(50), workers)) == list(range(0, 100, 2))


@pytest.mark.skipif(os.name == "nt", reason="there are no such groups")
def test_ctrl_c_in_a_terminal_does_not_reach_workers():
    """It would interrupt their imports, before they can ignore it, and each would say so."""
    assert set(parallel_map(group_of, range(3), 2)).isdisjoint({os.getpgrp()})


def test_parallel_map_reads_only_a_little_ahead():
    taken = []
    results = parallel_map(double, (taken.append(i) or i for i in range(1000)), 2)
    assert next(results) == 0
    assert len(taken) < 10
    results.close()


def test_what_nobody_waits_for_is_not_made(tmp_path):
    results = parallel_map(make_slowly, (tmp_path / str(i) for i in range(9)), 2)
    next(results)
    results.close()  # as Ctrl-C does: two are being made
    assert {path.name for path in tmp_path.iterdir()} == {"0"}


ENDS = [
    (die, DataError, r"ended \(exit status 7\) while preparing data: see above"),
    (leave, DataError, r"ended \(exit status 1\) while preparing data: see above"),
    (make_what_cannot_be_sent, DataError, r"ended \(exit status 1\) .*: see above"),
    (run_out_of_memory, DataError, r"ended \(exit status -9\) .*: free some memory"),
    (refuse, DataError, "refused"),
    (divide, ZeroDivisionError, "division by zero"),
]


@pytest.mark.parametrize(("function", "error", "text"), ENDS)
def test_failing_worker(function, error, text, capfd):
    if function is run_out_of_memory and not hasattr(signal, "SIGKILL"):
        pytest.skip("Windows has another status")
    with pytest.raises(error, match=text):
        list(parallel_map(function, range(5), 2))
    said = capfd.readouterr().err
    assert ("Traceback" in said) == (function in (leave, make_what_cannot_be_sent))


def test_a_worker_that_cannot_start_takes_the_others_with_it(monkeypatch):
    start, started = workers.start, []

    def refused_the_second_time():
        if started:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        started.append(start())
        return started[0]

    monkeypatch.setattr(workers, "start", refused_the_second_time)
    with pytest.raises(BlockingIOError):
        list(parallel_map(double, range(3), 2))
    assert started[0].returncode is not None


def test_workers_have_the_environment_of_their_parent(monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    seen = parallel_map(os.getenv, ["XDG_CACHE_HOME", "OPENBLAS_NUM_THREADS"], 2)
    assert list(seen) == [os.environ["XDG_CACHE_HOME"], "1"]


def test_workers_import_nothing_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "random.py").write_text("raise SystemExit('a pupil wrote this')")
    monkeypatch.chdir(tmp_path)
    assert list(parallel_map(double, range(3), 2)) == [0, 2, 4]


def test_workers_find_what_their_parent_finds(tmp_path, monkeypatch):
    """As in a notebook that appends a Path, of which Python makes nothing, in an odd folder."""
    folder = tmp_path / f"at{os.pathsep}noon"
    folder.mkdir()
    (folder / "found_at_noon.py").write_text("def triple(x): return 3 * x")
    monkeypatch.setattr(sys, "path", [tmp_path, str(folder), *sys.path])
    triple = importlib.import_module("found_at_noon").triple
    assert list(parallel_map(triple, range(3), 2)) == [0, 3, 6]


def test_a_worker_that_answers_in_another_language_is_ended(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("print('hello', flush=True)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(DataError, match="a worker process ended"):
        list(parallel_map(double, range(3), 2))


def test_printing_worker(capfd):
    assert list(parallel_map(chatter, range(3), 2)) == [0, 1, 2]
