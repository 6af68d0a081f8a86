"""How the cores of this machine are used, and how the memory of arrays is reused.

NumPy releases the interpreter lock in copies, arithmetic and matrix products, so plain Python
threads that each work on their own images run side by side. BLAS's own threads keep a core busy for
a while after a product, waiting for the next, and get in their way (with other work on the machine,
a step took twice as long), so once `parallel` is in use they do only large products.
"""

import ctypes
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from functools import cache, partial
from operator import length_hint
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np

from .errors import ConfigError

CGROUP = Path("/sys/fs/cgroup")  # where Linux tells a container of its limits


def available_cores() -> int:
    """Cores this process may run on (perhaps not all of the machine's), or as many as amount to the
    time that its container may use.
    """
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    cores = len(affinity(0))
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # versions 2, 1
        with suppress(OSError, ValueError):  # another version, or "max": no limit
            quota, period = map(int, " ".join((CGROUP / n).read_text() for n in names).split())
            cores = min(cores, -(-quota // period)) if quota > 0 else cores
    return cores


_threads = available_cores()
_workers: list[Thread] = []
_tasks: SimpleQueue = SimpleQueue()  # (work, outcomes, place, done); None ends a worker
_free = [None]  # empty while the workers work; unlike a lock's, its taking no Ctrl-C can divide


def threads() -> int:
    """Threads that `parallel` and BLAS use."""
    return _threads


def set_threads(n: int) -> None:
    """Use `n` threads from now on, in `parallel` and in BLAS; 0: one for each core it may use."""
    global _threads
    if n not in range(1025):
        raise ConfigError(f"threads must be a whole number from 0 to 1024, not {n}")
    while True:
        try:
            del _free[0]
            break
        except IndexError:
            time.sleep(0.001)
    try:
        _threads = n = int(n) or available_cores()
        while len(_workers) >= n:
            _tasks.put(None)
            _workers.pop()
        _set_blas_threads(n)
    finally:
        _free.append(None)


def parallel(work: Callable[[int, int], Any], n: int, block: int = 1) -> list[Any]:
    """Call work(start, stop) on contiguous parts of range(n), one part per thread, in the caller's
    context; returns the results in order.

    The length of a part (but the last) is a multiple of `block`. For a run to be repeatable with
    another thread count, results must not depend on how many parts there are. If the threads are
    busy, with another thread's work or with the caller's, the calling thread does all parts itself.
    """
    size = max(block, block * -(-n // (block * _threads)))
    parts = [(start, min(n, start + size)) for start in range(0, n, size)] or [(0, 0)]
    if len(parts) == 1:
        return [work(*parts[0])]
    try:
        del _free[0]
    except IndexError:
        return [work(*part) for part in parts]
    try:
        return _side_by_side(work, parts)
    finally:
        _free.append(None)


def _side_by_side(work: Callable[[int, int], Any], parts: list[tuple[int, int]]) -> list[Any]:
    while len(_workers) < len(parts) - 1:
        worker = Thread(target=_serve, args=(_tasks,), name="minisimclr", daemon=True)
        worker.start()
        _workers.append(worker)
    _set_blas_threads(1)
    outcomes: list[Any] = [None] * (len(parts) - 1)  # (result, error) of each
    done: SimpleQueue = SimpleQueue()
    jobs = [partial(copy_context().run, work, *part) for part in parts[1:]]
    unsent = iter([(job, outcomes, place, done) for place, job in enumerate(jobs)])
    interrupt = None
    try:
        deque(map(_tasks.put, unsent), maxlen=0)  # one call, so that Ctrl-C leaves none half sent
        first = work(*parts[0])
    finally:  # after an error too: no worker may write into arrays reused later
        while True:
            try:  # Ctrl-C has to wait, too, and may swallow a `done`
                sent = len(outcomes) - length_hint(unsent)
                while any(outcome is None for outcome in outcomes[:sent]):
                    done.get()
                break
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt
    errors = [error for _, error in outcomes if error is not None]
    if errors:
        try:
            raise errors[0]
        finally:
            del errors, outcomes  # else the error holds this frame, and this frame the error
    return [first, *(result for result, _ in outcomes)]


def _serve(tasks: SimpleQueue) -> None:
    """The life of a worker. The standard library's executor would do, but handing over a task
    takes it 10 to 40 us more, and a training step does so 66 (default network) to 480 times.
    """
    while (task := tasks.get()) is not None:
        work, outcomes, place, done = task
        try:
            outcomes[place] = work(), None
        except BaseException as error:
            outcomes[place] = None, error
        done.put(None)
        del task, work, outcomes, done  # and the arrays they hold


def _forget_workers() -> None:
    """For the child of a fork, which has none of these threads."""
    global _tasks, _free
    _tasks, _free = SimpleQueue(), [None]
    _workers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)


@cache
def _blas() -> tuple[Callable[[int], None] | None, str]:
    """The function that sets how many threads NumPy's BLAS uses, and, of OpenBLAS, the processor
    whose products it has chosen; None and "" for a BLAS other than OpenBLAS and Intel's MKL.
    """
    module = np._core._multiarray_umath.__file__  # type: ignore[attr-defined]
    # Names are looked up in what the module is linked with, too, but not on Windows.
    libraries = map(str, [module, *Path(np.__file__).parent.parent.glob("numpy.libs/*openblas*")])
    for library in map(ctypes.CDLL, libraries):
        for prefix, suffix in (("scipy_", "64_"), ("", "64_"), ("scipy_", ""), ("", "")):
            setter = getattr(library, f"{prefix}openblas_set_num_threads{suffix}", None)
            if setter is not None:
                name_of = getattr(library, f"{prefix}openblas_get_corename{suffix}")
                name_of.restype = ctypes.c_char_p
                return setter, name_of().decode()
        if hasattr(library, "MKL_Set_Num_Threads"):
            return library.MKL_Set_Num_Threads, ""
    return None, ""


def sets_blas_threads() -> bool:
    """Whether NumPy's BLAS is one whose threads are set here."""
    return _blas()[0] is not None


def blas_kernels() -> str:
    """The processor whose matrix products OpenBLAS uses, such as Haswell; those of another
    processor add in another order. "" for another BLAS.
    """
    return _blas()[1]


_blas_threads = 0  # what was asked for last


def _set_blas_threads(n: int) -> None:
    global _blas_threads
    if n != _blas_threads and (setter := _blas()[0]) is not None:
        setter(min(n, available_cores()))  # more would wait for each other, spinning
    _blas_threads = n


@contextmanager
def threaded_blas() -> Iterator[None]:
    """Let BLAS use all threads within the block: for work that consists of large products."""
    before = _blas_threads
    _set_blas_threads(_threads)
    try:
        yield
    finally:
        _set_blas_threads(before or _threads)


def reuse_memory() -> None:
    """Keep freed memory in the process, ready for the next array, if the C library can.

    Otherwise glibc gives every large array back to the system at once, and the next one's pages
    come one fault at a time: a ReLU of 33 MB takes 6.1 ms, not 3.1. On a GPU CuPy has a pool.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    trim_threshold, mmap_max = -1, -4  # of <malloc.h>
    if mallopt is not None and mallopt(mmap_max, 0):
        mallopt(trim_threshold, 2**31 - 1)


def peak_resident() -> int:
    """The most bytes of memory that this process has held so far."""
    if sys.platform == "win32":
        counters = (ctypes.c_size_t * 9)()  # 72 bytes: two numbers of 32 bits, then the peak
        ctypes.windll.kernel32.K32GetProcessMemoryInfo(ctypes.c_void_p(-1), counters, 72)
        return counters[1]
    with suppress(OSError, IndexError):  # on Linux `getrusage` counts what its parent held, too
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
