"""Which array library, device and threads: the only file that knows both NumPy and CuPy.

The array decides: every operation asks `xp_of(x)` for the library its array belongs to, so both
live in one process and nothing is chosen at import time. CuPy is imported where a GPU is asked for,
never before.
"""

import ctypes
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ConfigError

Array = Any  # numpy.ndarray or cupy.ndarray


def xp_of(array: Array) -> Any:
    """The library (numpy or cupy) that `array` belongs to."""
    if isinstance(array, (np.ndarray, np.generic)):
        return np
    return cupy()


@cache
def cuda_driver() -> int:
    """The newest CUDA that this machine's NVIDIA driver supports (12.4 is 12040); 0: no driver."""
    version = ctypes.c_int()
    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        library.cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return version.value


#: Called with CuPy as soon as it is used for the first time.
on_cupy: list[Callable[[Any], None]] = []


@cache
def cupy() -> Any:
    """CuPy, or a ConfigError that names the extra to install."""
    try:
        import cupy
    except ImportError as error:
        newest = "[cuda13]" if cuda_driver() >= 13000 else "[cuda12]"
        raise ConfigError(
            f"CuPy is not installed: pip install 'minisimclr{newest}', or use --device cpu"
        ) from error
    for act in on_cupy:
        act(cupy)
    return cupy


def to_host(array: Array) -> np.ndarray:
    """`array` as a NumPy array; copies (and waits for the GPU) only if it lives on one."""
    return np.asarray(array) if xp_of(array) is np else cupy().asnumpy(array)


def to_device(array: np.ndarray, device: str) -> Array:
    """A host array on `device` ("cpu" or "cuda:N"); the one place where data goes to a GPU."""
    if device == "cpu":
        return array
    with cupy().cuda.Device(int(device.removeprefix("cuda:"))):
        return cupy().asarray(array)


_landing: deque = deque(maxlen=64)  # kept: copies may be on their way here, though nobody waits


def later(numbers: Array) -> Callable[[], list[float]]:
    """Ask for `numbers` (n,) now; the function returned gives them on the host, and waits for no
    more than the GPU had been asked to do by now: it never idles if the next step was asked for.
    """
    if xp_of(numbers) is np:
        return numbers.tolist
    import cupyx

    host = cupyx.empty_pinned(numbers.shape, numbers.dtype)
    _landing.append(host)
    stream = cupy().cuda.get_current_stream()
    numbers.get(stream=stream, out=host, blocking=False)
    copied = stream.record()

    def read() -> list[float]:
        copied.synchronize()
        return host.tolist()

    return read


def choose_device(name: str) -> tuple[str, str]:
    """Resolve "auto", "cpu" or "cuda:N" to (device, the reason for it, in words).

    Raises ConfigError for a name of another form and for a GPU that cannot be used: only "auto" may
    end on the CPU, and it says why.
    """
    if name == "cpu":
        return "cpu", "asked for"
    if name != "auto" and not (name.startswith("cuda:") and name[5:].isdigit()):
        raise ConfigError(f"unknown device {name!r}: use auto, cpu or cuda:0, cuda:1, ...")
    index = 0 if name == "auto" else int(name[5:])
    try:
        reason = try_gpu(index)
        cupy().cuda.Device(index).use()  # where new arrays of this thread will be
        return f"cuda:{index}", reason
    except ConfigError as error:
        if name != "auto":
            raise
        return "cpu", str(error) if cuda_driver() else "no NVIDIA driver"


TWICE = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2; }'


@cache
def try_gpu(index: int) -> str:
    """Name and driver of a GPU on which a kernel, a matrix product and eigenvalues were tried.

    Raises ConfigError that says what is missing and the line to type.
    """
    if not cuda_driver():
        raise ConfigError("there is no NVIDIA driver for CUDA on this machine: use --device cpu")
    part = "finding a CUDA device"
    try:
        xp = cupy()
        if index >= (count := xp.cuda.runtime.getDeviceCount()):
            raise ConfigError(f"no device cuda:{index}: this machine has {count} CUDA device(s)")
        with xp.cuda.Device(index):
            part = "a kernel (NVRTC and CUDA's headers)"
            x = xp.ones((2, 2), np.float32)
            twice = xp.RawModule(code=TWICE).get_function("twice")
            twice((1,), (4,), (x,))
            part = "a matrix product (cuBLAS)"
            x = x @ x
            part = "eigenvalues (cuSOLVER)"
            xp.linalg.eigvalsh(x).get()
        name = xp.cuda.runtime.getDeviceProperties(index)["name"].decode()
    except ConfigError:
        raise
    except Exception as error:  # those of CuPy and of each library it loads have no common base
        said = (str(error) or type(error).__name__).splitlines()[0]
        line = f"pip install 'cupy-cuda{cuda_driver() // 1000}x[ctk]'"
        raise ConfigError(f"CuPy failed at {part}: {said}; {line}") from error
    driver = cuda_driver()
    return f"{name}, driver for CUDA {driver // 1000}.{driver % 1000 // 10}, CuPy {xp.__version__}"


@contextmanager
def precision(name: str, device: str) -> Iterator[None]:
    """Within the block, matrix products of float32 on a GPU round what they multiply to TF32's 10
    bits of mantissa ("tf32"; sums stay in float32), or do not ("fp32").

    Raises ConfigError for TF32 where there is none: on a CPU, and on GPUs before Ampere.
    """
    if name == "fp32":
        yield
        return
    if device == "cpu":
        raise ConfigError(f"precision {name} needs a GPU: on a CPU, use fp32")
    xp, index = cupy(), int(device.removeprefix("cuda:"))
    if int(xp.cuda.Device(index).compute_capability) < 80:
        raise ConfigError(f"precision {name} needs a GPU of compute capability 8.0 or more")
    try:  # not public; what is, CUPY_TF32 in the environment, is read only once
        switch, types = xp._core.set_compute_type, xp._core._routines_linalg
        tf32, before = types.COMPUTE_TYPE_TF32, types.get_compute_type(np.float32)
    except AttributeError as error:
        raise ConfigError(f"precision {name}: CuPy {xp.__version__} has no such switch") from error
    switch(np.float32, tf32)
    try:
        yield
    finally:
        switch(np.float32, before)


def synchronize(device: str) -> None:
    """Wait until `device` has done all it was asked to."""
    if device != "cpu":
        cupy().cuda.get_current_stream().synchronize()


def peak_memory(device: str) -> int:
    """Most bytes held so far: resident set of the process, or the GPU's memory pool."""
    if device != "cpu":
        return cupy().get_default_memory_pool().total_bytes()
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reuse_memory() -> bool:
    """Keep freed memory in the process, ready for the next array; true if the C library can.

    Otherwise glibc gives every large array back to the system at once, and the next one's pages
    come one fault at a time: a ReLU of 33 MB takes 6.1 ms, not 3.1. On a GPU CuPy has a pool.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    trim_threshold, mmap_max = -1, -4  # of <malloc.h>
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


# Threads. NumPy lets go of the interpreter lock in copies, arithmetic and matrix products, so plain
# Python threads that each work on their own images run side by side. Threads of BLAS keep a core
# busy for a while after a product, waiting for the next, and get in their way (with other work on
# the machine, a step took twice as long): once `parallel` is in use they only do large products.


def available_cores() -> int:
    """Cores this process may run on (not those of the machine)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_threads = available_cores()
_pool: ThreadPoolExecutor | None = None


def threads() -> int:
    """Threads that `parallel` and BLAS use."""
    return _threads


def set_threads(n: int) -> None:
    """Use `n` threads from now on, in `parallel` and in BLAS; 0: as many as there are cores."""
    global _threads, _pool
    if n < 0:
        raise ConfigError(f"threads must be at least 0, not {n}")
    _threads = n = n or available_cores()
    if _pool is not None:
        _pool.shutdown()
        _pool = None
    _set_blas_threads(n)


def parallel(work: Callable[[int, int], Any], n: int, block: int = 1) -> list[Any]:
    """Call work(start, stop) on contiguous parts of range(n), one part a thread; their results in
    order.

    Parts are multiples of `block` long (but for the last). Results must not depend on how many
    parts there are if a run is to be repeatable with another thread count. Do not nest.
    """
    global _pool
    size = block * -(-n // (block * _threads))
    parts = [(start, min(n, start + size)) for start in range(0, n, size)]
    if len(parts) == 1:
        return [work(*parts[0])]
    if _pool is None:
        _pool = ThreadPoolExecutor(_threads - 1, thread_name_prefix="minisimclr")
    _set_blas_threads(1)
    futures = [_pool.submit(work, *part) for part in parts[1:]]
    try:
        return [work(*parts[0])] + [future.result() for future in futures]
    finally:
        wait(futures)  # after an error too: nobody writes into arrays that others reuse


@cache
def _openblas() -> Any:
    """Sets the threads of the OpenBLAS inside NumPy's wheel; None for another BLAS."""
    folder = Path(np.__file__).parent
    names = [*folder.parent.glob("numpy.libs/*openblas*"), *folder.glob(".dylibs/*openblas*")]
    for name in names:
        library = ctypes.CDLL(str(name))
        for prefix, suffix in (("scipy_", "64_"), ("", "64_"), ("scipy_", ""), ("", "")):
            setter = getattr(library, f"{prefix}openblas_set_num_threads{suffix}", None)
            if setter is not None:
                return setter
    return None


_blas_threads = 0  # what was asked for last


def _set_blas_threads(n: int) -> None:
    global _blas_threads
    if n != _blas_threads and (library := _openblas()) is not None:
        library(n)
    _blas_threads = n


@contextmanager
def threaded_blas() -> Iterator[None]:
    """Let BLAS use all threads within the block: for work that is large matrix products."""
    before = _blas_threads
    _set_blas_threads(_threads)
    try:
        yield
    finally:
        _set_blas_threads(before or _threads)
