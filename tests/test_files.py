"""Durable files: every failure leaves the old content, no temporary file, and a clear error."""

import errno
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from unittest.mock import Mock, patch

import pytest

from minisimclr import files
from minisimclr.errors import OutputError


def on(system):
    return patch.object(os, "name", system)


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("n", (1, 2) if os.name == "nt" else (1, 2, 3))
def test_any_failing_call_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch, n, old):
    """The n-th of fsync (file), rename, fsync (directory) fails."""
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    calls = []

    def failing(original):
        def call(*arguments):
            calls.append(original)
            if len(calls) == n:
                raise OSError(errno.EIO, "planted")
            return original(*arguments)

        return call

    monkeypatch.setattr(os, "fsync", failing(os.fsync))
    monkeypatch.setattr(Path, "replace", failing(Path.replace))
    with pytest.raises(OSError, match="planted"):
        files.write_bytes(path, b"new")
    assert len(calls) == n
    assert (path.read_bytes() if path.exists() else None) == (old if n < 3 else b"new")
    assert [p.name for p in tmp_path.iterdir()] == (["file"] if path.exists() else [])


def test_windows_is_asked_again_to_rename_what_others_have_open(tmp_path, monkeypatch):
    class Mapped:
        def __init__(self):
            self.circle = self  # only the garbage collector finds it

    replace, asked, mapped = Path.replace, [], weakref.ref(Mapped())

    def held(path, to):
        asked.append(to)
        if mapped() or len(asked) < 4:
            raise PermissionError(errno.EACCES, "somebody has it open")
        return replace(path, to)

    (tmp_path / "new").touch()
    monkeypatch.setattr(Path, "replace", held)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    with on("posix"), pytest.raises(PermissionError):
        files.rename(tmp_path / "new", tmp_path / "old")
    assert len(asked) == 1 and mapped()
    with on("nt"):
        files.rename(tmp_path / "new", tmp_path / "old")
    assert len(asked) == 4 and [p.name for p in tmp_path.iterdir()] == ["old"]
    mapped = Mapped
    with on("nt"), pytest.raises(PermissionError):
        files.rename(tmp_path / "old", tmp_path / "older")
    assert len(asked) == 4 + 6 and [p.name for p in tmp_path.iterdir()] == ["old"]


def test_what_windows_would_not_replace_is_told_before_the_work(tmp_path, monkeypatch):
    def held(path, to):
        raise PermissionError(errno.EACCES, "is used by another process")

    monkeypatch.setattr(Path, "rename", held)
    files.require_writable(tmp_path / "file")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file: is used by another process"):
        files.require_writable(tmp_path / "file")


def test_a_trial_is_not_taken_for_what_a_dead_process_left(tmp_path, monkeypatch):
    class Raced:
        def __init__(self, **named):
            self.trial = original(**named)

        def __enter__(self):
            with files.locked(tmp_path / "file"):  # as another process may do at any time
                self.trial.__enter__()

        def __exit__(self, *error):
            self.trial.__exit__(*error)

    original = files.tempfile.NamedTemporaryFile
    monkeypatch.setattr(files.tempfile, "NamedTemporaryFile", Raced)
    files.require_writable(tmp_path / "file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no devices and the like")
def test_what_is_no_file_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "device")
    for name in ("device", ""):
        with pytest.raises(OSError, match="not a file that can be replaced"):
            files.write_bytes(tmp_path / name, b"new")
        with pytest.raises(OutputError, match="not a file that can be replaced"):  # before the work
            files.require_writable(tmp_path / name)
    assert (tmp_path / "device").is_fifo() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(os.name == "nt", reason="has other modes")
def test_what_was_private_stays_so(tmp_path):
    (tmp_path / "file").touch(mode=0o600)
    files.write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
    files.write_bytes(tmp_path / "new", b"new")  # and what was not is for all whom umask lets
    (tmp_path / "usual").touch()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_what_is_write_protected_is_never_replaced(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    files.write_bytes(path, b"old")
    path.chmod(0o444)
    # Those who may do anything are asked to obey, too.
    monkeypatch.setattr(os, "access", lambda p, mode: bool(Path(p).stat().st_mode & mode << 6))
    with pytest.raises(OutputError, match=r"cannot write to .*x\.json: is write-protected"):
        files.require_writable(path)
    with pytest.raises(PermissionError):
        files.write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_name_that_is_too_long_is_told_before_the_work(tmp_path):
    files.require_writable(tmp_path / ("x" * 200))
    with pytest.raises(OutputError, match="cannot write to"):
        files.require_writable(tmp_path / ("x" * 250))


def test_what_a_link_points_to_is_replaced_and_not_the_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_bytes(b"old")
    try:
        (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    except OSError:
        pytest.skip("links may not be made here")
    files.write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "file").read_bytes() == b"new"
    assert len(list((tmp_path / "there").iterdir())) == 1
    # It may be on another disk, where nothing can be renamed to.
    with patch.object(files, "sync") as flushed, files.publish(tmp_path / "link") as temporary:
        temporary.touch()
    assert temporary.parent.name == "there" and flushed.call_args.args == (temporary.parent,)
    (tmp_path / "early").symlink_to(tmp_path / "later" / "file")
    files.write_bytes(tmp_path / "early", b"new")
    assert (tmp_path / "later" / "file").read_bytes() == b"new"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    files.write_bytes(tmp_path / "loop", b"new")  # leads nowhere
    assert (tmp_path / "loop").read_bytes() == b"new"
    (tmp_path / "nowhere").symlink_to("/proc/self/x")
    if Path("/proc/self").exists():
        with pytest.raises(OutputError, match="cannot write"):
            files.require_writable(tmp_path / "nowhere")


def test_a_drive_that_does_not_exist_takes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: False)  # as on Windows: not even Q:\\ does
    with pytest.raises(OutputError, match=r"cannot write to .*run: No such file"):
        files.require_writable(tmp_path / "nowhere" / "run")


@pytest.mark.parametrize("named", [True, False], ids=["as open says it", "as write says it"])
def test_an_error_names_the_file_that_was_asked_for(tmp_path, monkeypatch, named):
    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device", *[str(self)] * named)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left") as raised:
        files.write_bytes(tmp_path / "file", b"new")
    assert raised.value.filename == str(tmp_path / "file")
    with pytest.raises(FileNotFoundError) as raised, files.publish(tmp_path / "file"):
        (tmp_path / "source").read_bytes()
    assert raised.value.filename == str(tmp_path / "source")


def test_interrupt_while_writing_removes_the_temporary_file(tmp_path):
    with pytest.raises(KeyboardInterrupt), files.publish(tmp_path / "file") as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_data_is_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(files, "sync", lambda path: order.append(path.name))
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    files.write_bytes(tmp_path / "file", b"new")
    assert order[0].endswith(".tmp")
    assert order[1:] == ["rename", tmp_path.name]


@pytest.mark.skipif(files.fcntl is None, reason="Windows refuses all others itself")
def test_a_file_is_flushed_by_one_who_may_write_it(tmp_path, monkeypatch):
    modes = []

    def fsync(descriptor):
        if not Path(f"/dev/fd/{descriptor}").is_dir():
            modes.append(files.fcntl.fcntl(descriptor, files.fcntl.F_GETFL) & os.O_ACCMODE)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_bytes(tmp_path / "file", b"new")
    assert modes == [os.O_RDWR]


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="open files cannot be counted")
def test_no_file_stays_open(tmp_path):
    counts = []
    for name in "ab":
        files.write_bytes(tmp_path / name, b"x")
        counts.append(len([*Path("/dev/fd").iterdir()]))
    assert counts[1] <= counts[0]  # a collected one may have been closed meanwhile


@pytest.mark.skipif(os.name == "nt", reason="cannot open directories")
def test_a_directory_that_cannot_be_flushed_is_no_failure(tmp_path, monkeypatch):
    """Linux says "invalid argument" for those that VirtualBox shares."""

    def fsync(descriptor):
        if Path(f"/dev/fd/{descriptor}").is_dir() == directories:
            raise OSError(errno.EINVAL, "Invalid argument")

    directories = True
    monkeypatch.setattr(os, "fsync", fsync)
    files.write_bytes(tmp_path / "file", b"new")
    directories = False
    with pytest.raises(OSError, match="Invalid"):
        files.write_bytes(tmp_path / "file", b"newer")
    assert (tmp_path / "file").read_bytes() == b"new"


class Windows:
    """Its `msvcrt`, as far as locks go: another process holds the file for two questions."""

    LK_NBLCK = 2

    def __init__(self):
        self.asked = 0

    def locking(self, descriptor, mode, count):
        assert os.fstat(descriptor) and (mode, count) == (self.LK_NBLCK, 1)
        self.asked += 1
        if self.asked < 3:
            raise PermissionError(errno.EACCES, "Permission denied")


def test_locks_of_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files, "msvcrt", there := Windows(), raising=False)
    with pytest.raises(BlockingIOError), files.locked(tmp_path / "file", wait=False):
        pass
    with pytest.warns(UserWarning, match=r"holds .*\.file\.lock"), files.locked(tmp_path / "file"):
        assert there.asked == 3


def test_lock_removes_what_dead_writers_of_this_file_left_and_nothing_else(tmp_path):
    kept = [tmp_path / name for name in (".other.0123.tmp", "cache[1].h5", ".cache1.h5.0.tmp")]
    stale = tmp_path / ".cache[1].h5.0123abcd.tmp"
    for path in (*kept, stale):
        path.write_bytes(b"")
    with files.locked(tmp_path / "cache[1].h5"):
        assert not stale.exists()
    assert all(path.exists() for path in kept)


def test_folders_above_a_file_are_made(tmp_path):
    files.write_bytes(tmp_path / "a" / "b" / "file", b"all")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"all"
    assert not files.unfinished


@pytest.mark.parametrize("terminal", [True, False])
def test_a_signal_ends_the_first_process_of_a_container_too(terminal, tmp_path, monkeypatch):
    """What it sends itself does nothing there; and its file has a name, but is not yet made."""
    ends, said = [], []
    monkeypatch.setattr(sys, "stderr", Mock(**{"isatty.return_value": terminal}))
    monkeypatch.setattr(os, "write", lambda *given: said.append(given))
    monkeypatch.setattr(os, "kill", lambda _, number: ends.append(number))
    monkeypatch.setattr(os, "_exit", ends.append)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with files.nothing_unfinished(), files.publish(tmp_path / "file") as temporary:
            signal.raise_signal(signal.SIGTERM)
            temporary.write_bytes(b"")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ends == [signal.SIGTERM, 128 + signal.SIGTERM]
    assert said == [(2, b"\x1b[?25h\n")] * terminal  # the cursor that a bar has hidden is back


def test_a_handler_of_another_program_stays():
    before = signal.signal(signal.SIGTERM, own := lambda *_: None)
    try:
        with files.nothing_unfinished():
            assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("failing, named", [(1, "file"), (2, "")])
def test_what_cannot_be_flushed_is_named(failing, named, tmp_path, monkeypatch):
    outcomes = [OSError(errno.EIO, "Input/output error") if i == failing else 0 for i in (1, 2)]
    monkeypatch.setattr(os, "fsync", Mock(side_effect=outcomes))
    with pytest.raises(OSError, match="Input/output error") as caught:
        files.write_bytes(tmp_path / "file", b"all")
    assert Path(caught.value.filename) == tmp_path / named


@pytest.mark.parametrize(
    "value, like, same",
    [
        ([1, 2.5], (float, float), True),
        ([1, 2.5, 3], (float, float), False),
        ([1], (float, float), False),
        ([1, "2"], (float, float), False),
        ("12", (object, object), False),
        ([], [float], True),
        ([1, None], [float], False),
        ({"a": 1, "b": 2}, {"a": float}, True),
        ({"b": 2}, {"a": float}, False),
        ({"x": 1, "y": "2"}, {None: float}, False),
        ([], {}, False),
        (1, str, False),
        ([1, 1e-9], [0.0], True),
        ([0], [0.0], False),
        ([float("nan")], [0.0], False),
        ([float("inf")], [0.0], False),
        (float("-inf"), float, False),
        (["1"], [0.0], False),
    ],
)
def test_what_a_file_holds_is_compared_with_its_form(value, like, same):
    assert files.fits(value, like) is same


def test_lock_is_held_and_dies_with_its_process(tmp_path):
    path = tmp_path / "file"
    script = (
        "import sys, pathlib, minisimclr.files as f\n"
        "with f.locked(pathlib.Path(sys.argv[1])):\n    print('locked', flush=True); input()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", script, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as holder:
        assert holder.stdout.readline().strip() == b"locked"
        with pytest.raises(BlockingIOError), files.locked(path, wait=False):
            pass
        threading.Timer(0.3, holder.kill).start()
        told = pytest.warns(UserWarning, match="waiting for the process that holds")
        with told, files.locked(path):
            assert holder.wait(5)


def test_a_leftover_that_cannot_be_removed_yet_stops_nobody(tmp_path, monkeypatch):
    """A worker of a process that died still has it open, on Windows."""

    def held(path, missing_ok=False):
        raise PermissionError(errno.EACCES, "somebody has it open")

    (tmp_path / ".file.0123abcd.tmp").touch()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", held)
        with files.locked(tmp_path / "file"):
            assert list(tmp_path.glob("*.tmp"))
    with files.locked(tmp_path / "file"):
        assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, 524])
def test_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, code):
    if files.fcntl is None:
        pytest.skip("no flock here")

    def refuse(*_):
        raise OSError(code, "no locks")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    stale = tmp_path / ".file.0123abcd.tmp"
    stale.write_bytes(b"maybe somebody is writing this")
    with pytest.warns(UserWarning, match="no locks"), files.locked(tmp_path / "file"):
        files.write_bytes(tmp_path / "file", b"new")
    assert stale.exists()
    assert (tmp_path / "file").read_bytes() == b"new"


def test_other_lock_errors_are_errors(tmp_path, monkeypatch):
    if files.fcntl is None:
        pytest.skip("no flock here")

    def refuse(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with pytest.raises(OSError, match="broken"), files.locked(tmp_path / "file"):
        pass
