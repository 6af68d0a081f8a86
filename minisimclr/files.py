"""Files that others use too: durable writes, locks, and JSON that someone may have changed; and
signals, which must leave nothing half-written.

A file under its final name is always complete, no matter which process is killed, or when.

The recipe (Pillai et al., OSDI 2014): write a temporary file in the same directory, fsync it,
rename it over the final name, fsync the directory. Temporary and lock names start with a dot.
"""

import errno
import gc
import glob
import hashlib
import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any, TextIO

from .errors import OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt

CANNOT_LOCK = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, 524)  # 524: what NFS on Linux returns

PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8)  # seconds between attempts to rename

unfinished: set[Path] = set()  # temporary files, or a run's folder, that are being written


@contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; rename it to `path` on success, remove it on any failure.

    Makes the folders above it. Raises OSError if the directory cannot be written, the disk is full
    or `path` is not a file, and then leaves `path` untouched; or if its folder cannot be flushed.
    """
    place = target(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")
    unfinished.add(temporary)
    try:
        yield temporary
        sync(temporary)
        if place.exists():  # what was private stays so
            shutil.copymode(place, temporary)
        rename(temporary, place)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            error.filename = str(path)  # the name the user knows
        raise
    finally:
        unfinished.discard(temporary)
    sync(place.parent)


def rename(path: Path, to: Path) -> None:
    """Give a file or folder its final name; a file that has it is replaced.

    Windows refuses that while anyone has one of the two open, as programs that scan, index or copy
    what is new do for moments: there, it is tried again.
    """
    for pause in (*PAUSES, None):
        try:
            path.replace(to)
            return
        except PermissionError:
            if os.name != "nt" or pause is None:
                raise
            gc.collect()  # which closes what nobody uses any more, such as a data set
            time.sleep(pause)


@contextmanager
def nothing_unfinished() -> Iterator[None]:
    """Within the block, SIGTERM and SIGHUP first remove files that are being written, then end this
    process. (An exception might be lost in a callback.)
    """

    def end(number: int, before: dict[int, Any]) -> None:
        for path in unfinished.copy():
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if sys.stderr and sys.stderr.isatty():
            os.write(2, b"\x1b[?25h\n")  # the cursor, which a progress bar hides
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        os._exit(128 + number)  # the first process of a container outlives that

    ours = {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    # nohup ignores SIGHUP, and others have handlers of their own.
    with handling((s for s in ours if signal.getsignal(s) == signal.SIG_DFL), end):
        yield


@contextmanager
def handling(numbers: Iterable[int], act: Callable[[int, dict], None]) -> Iterator[None]:
    """Within the block, each of these signals calls act(its number, the handlers before), but for
    those that are ignored, as by nohup and in jobs behind `&`, or handled by a program around this
    Python. Another thread than the main one may not handle signals: there, nothing changes.
    """
    before = {n: signal.getsignal(n) for n in numbers if current_thread() is main_thread()}
    before = {n: h for n, h in before.items() if h not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, lambda number, frame: act(number, before))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def target(path: Path) -> Path:
    """The file that writing to `path` replaces: a link itself stays, and its target is replaced.

    Raises FileExistsError for what is no file, PermissionError for a file that is write-protected.
    """
    if path.exists() and not path.is_file():  # renaming over it would replace a device
        raise FileExistsError(errno.EEXIST, "is not a file that can be replaced", str(path))
    if path.exists() and not os.access(path, os.W_OK):  # to rename asks the folder only
        raise PermissionError(errno.EACCES, "is write-protected", str(path))
    return Path(os.path.realpath(path))


def sync(path: Path) -> None:
    """Flush a file or directory to the disk; a failure is a failed write and raises OSError."""
    folder = path.is_dir()
    if folder and os.name == "nt":  # which cannot open directories
        return
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # Windows: must be writable
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (folder and error.errno == errno.EINVAL):  # a file system that flushes files alone
            error.filename = str(path)
            raise
    finally:
        os.close(descriptor)


def require_writable(path: Path) -> None:
    """Raise OutputError if nothing can be created at `path`; leaves no trace."""
    try:
        place = target(path)
        if place.exists():
            place.rename(place)  # does nothing, but on Windows fails if the file is open
        parent = next((p for p in place.parents if p.exists()), path)  # no such drive: fails
        with tempfile.NamedTemporaryFile(dir=parent, prefix=f".{path.name}-", suffix=".tmp"):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to {path}: {error.strerror}") from error


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Publish `content` as the whole file `path`."""
    with publish(path) as temporary:
        temporary.write_bytes(content)


def read_json(path: Path, like: Any) -> Any:
    """Content of a JSON file; None if it is absent, damaged or not of the form `like` (`fits`)."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if fits(value, like) else None


def fits(value: Any, like: Any) -> bool:
    """Whether a value from a file has the form `like`: a type (float: any finite number); a number
    such as 0.0, one above it; [x], a list of any length; (x, y), a list like it; a dict of
    required keys; {None: x}, a dict of any keys.
    """
    match like:
        case dict():
            if not isinstance(value, dict):
                return False
            named = dict.fromkeys(value, like[None]) if None in like else like
            return all(key in value and fits(value[key], form) for key, form in named.items())
        case list():
            return isinstance(value, list) and all(fits(each, like[0]) for each in value)
        case tuple():
            long = isinstance(value, list) and len(value) == len(like)
            return long and all(map(fits, value, like))
        case float():
            return isinstance(value, (int, float)) and like < value < 1e100
    if like is float:
        return isinstance(value, (int, float)) and abs(value) < 1e100  # not NaN either
    return isinstance(value, like)


def sha256(content: bytes | memoryview) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(content).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of `path` (a hidden file beside it). The kernel frees it when the process dies.

    Only the holder may publish at `path`, so leftovers of dead processes are removed. With
    wait=False a lock held by another process raises BlockingIOError; else a warning says that it is
    waited for. If the file system cannot lock, a warning says so: racing processes then do the same
    work, and the last one wins.
    """
    with path.with_name(f".{path.name}.lock").open("a") as handle:
        try:
            _lock(handle, wait)
            for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
                with suppress(PermissionError):  # a worker of a dead process, on Windows, has it
                    stale.unlink(missing_ok=True)
        except OSError as error:
            if error.errno not in CANNOT_LOCK:
                raise
            warnings.warn(f"{path.parent}: this file system has no locks", stacklevel=3)
        yield


def _lock(handle: TextIO, wait: bool) -> None:
    """Raise BlockingIOError if another process holds the lock and `wait` is false."""
    for asked in count():
        try:
            if fcntl is not None:
                return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        except (BlockingIOError, PermissionError) as error:  # the latter on Windows
            if not wait:
                raise BlockingIOError(error.errno, error.strerror) from error
        if not asked:
            warnings.warn(f"waiting for the process that holds {handle.name}", stacklevel=4)
        time.sleep(0.1)
