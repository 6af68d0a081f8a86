"""Which array library and device: the only file that imports CuPy.

The array decides: every operation asks `xp_of(x)` for the library its array belongs to, so both
live in one process. Nothing is chosen at import time; CuPy is imported only for a GPU.
"""

import ctypes
import gc
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from importlib.metadata import distributions
from typing import Any

import numpy as np

from .cores import peak_resident
from .errors import ConfigError

Array = Any  # numpy.ndarray or cupy.ndarray


def xp_of(array: Array) -> Any:
    """The library (numpy or cupy) that `array` belongs to. Raises TypeError for anything else."""
    if isinstance(array, (np.ndarray, np.generic)):
        return np
    if isinstance(array, getattr(sys.modules.get("cupy"), "ndarray", ())):
        return cupy()
    raise TypeError(f"this takes arrays (np.asarray, Tensor.data), not {type(array)}")


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


on_cupy: list[Callable[[Any], None]] = []  # called with CuPy as soon as it is used


def wheel() -> str:
    """Which CuPy: CUDA 13's, if there and run by the driver, else 12's, which most cards run."""
    names = {found.metadata["Name"] for found in distributions()}
    return "cupy-cuda13x" if cuda_driver() >= 13000 and "cupy-cuda13x" in names else "cupy-cuda12x"


@cache
def cupy() -> Any:
    """CuPy, or a ConfigError with the command that installs it."""
    try:
        import cupy
    except ImportError as error:
        line = f'pip install "{wheel()}[ctk]" ml_dtypes'
        raise ConfigError(f"CuPy is not installed: {line}, or use --device cpu") from error
    for act in on_cupy:
        act(cupy)
    return cupy


def to_host(array: Array) -> np.ndarray:
    """`array` as a NumPy array; copies (and waits for the GPU) only if it lives on one."""
    return np.asarray(array) if xp_of(array) is np else cupy().asnumpy(array)


def to_device(array: np.ndarray, device: str) -> Array:
    """A host array on `device` ("cpu" or "cuda:N"); pictures go to a GPU here and by `uploaded`."""
    if device == "cpu":
        return array
    with cupy().cuda.Device(int(device.removeprefix("cuda:"))):
        return cupy().asarray(array)


def uploaded(batches: Iterable[np.ndarray], device: str) -> Iterator[Array]:
    """Host arrays copied to `device` by a separate stream, each while the GPU still works on the
    one before.
    """
    if device == "cpu":
        yield from batches
        return
    copies, ready = cupy().cuda.Stream(non_blocking=True), None
    for batch in batches:
        with copies:
            x = to_device(batch, device)  # through pinned memory: nothing waits
            following = x, copies.record()
        if ready:
            yield _arrived(*ready)
            # Before the memory of this batch is reused:
            copies.wait_event(cupy().cuda.get_current_stream().record())
        ready = following
    if ready:
        yield _arrived(*ready)


def _arrived(x: Array, copied: Any) -> Array:
    cupy().cuda.get_current_stream().wait_event(copied)
    return x


_landing: deque = deque(maxlen=64)  # kept alive: copies may still be on their way here


def later(numbers: Array) -> Callable[[], list[float]]:
    """Ask for `numbers` (n,) now; the function returned gives them on the host. It waits only for
    work given to the GPU before now, so a GPU that was also given the next step never idles.
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
    """Resolve "auto", "cpu" or "cuda:N" to (device, the reason in words).

    Raises ConfigError for a name of another form and for a GPU that cannot be used: only "auto" may
    fall back on the CPU, and it says why.
    """
    if name == "cpu":
        return "cpu", "asked for"
    if name != "auto" and not (name.startswith("cuda:") and name[5:].isdecimal()):
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


NO_GPU = "no GPU can be seen"
TWICE = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2; }'


@cache
def try_gpu(index: int) -> str:
    """Name and driver of a GPU on which a kernel, a matrix product and eigenvalues were tried.

    Raises ConfigError saying what is missing and what to type.
    """
    if not cuda_driver():
        raise ConfigError("there is no NVIDIA driver for CUDA on this machine: use --device cpu")
    part = "finding a CUDA device"
    try:
        xp = cupy()
        if index >= (count := xp.cuda.runtime.getDeviceCount()):
            raise ConfigError(f"no device cuda:{index}: number of CUDA devices here: {count}")
        with xp.cuda.Device(index):
            part = "a kernel (NVRTC and CUDA's headers)"
            x = xp.ones((2, 2), np.float32)
            twice = xp.RawModule(code=TWICE).get_function("twice")
            twice((1,), (4,), (x,))
            part = "a matrix product (cuBLAS)"
            x = x @ x
            part = "eigenvalues (cuSOLVER)"
            largest = xp.linalg.eigvalsh(x).get()[1]  # of ((8, 8), (8, 8))
            if abs(largest - 16) > 1e-3:
                raise ArithmeticError(f"{largest} where 16 is right")
        name = xp.cuda.runtime.getDeviceProperties(index)["name"].decode()
    except ConfigError:
        raise
    except Exception as error:  # CuPy and each library it loads: no common base class
        said = (str(error) or type(error).__name__).splitlines()[0]
        remedy = f'pip install "{wheel()}[ctk]"'
        if "NoDevice" in said:
            remedy = f"{NO_GPU}: nvidia-smi and CUDA_VISIBLE_DEVICES tell why"
        elif isinstance(error, MemoryError):
            remedy = "its memory is full: nvidia-smi shows what fills it"
        raise ConfigError(f"CuPy failed at {part}: {said}; {remedy}") from error
    driver = cuda_driver()
    return f"{name}, driver for CUDA {driver // 1000}.{driver % 1000 // 10}, CuPy {xp.__version__}"


# Type of an encoder's activations under the `precision` in force; None: that of the images.
activations: ContextVar[Any] = ContextVar("activations", default=None)


def bfloat16() -> np.dtype:
    """NumPy's bfloat16, from ml_dtypes. Raises ConfigError unless CuPy can add up arrays of it."""
    if not on_cupy:
        raise ConfigError("precision bf16 needs the CUDA kernels: unset MINISIMCLR_KERNELS")
    if int(cupy().__version__.split(".")[0]) < 14:
        raise ConfigError(f"precision bf16 needs CuPy 14 or newer, not {cupy().__version__}")
    if "EE->E" not in cupy().add.types:
        needs = 'ml_dtypes and NumPy 2.1.2 or newer: pip install ml_dtypes "numpy>=2.1.2"'
        raise ConfigError(f"precision bf16: CuPy {cupy().__version__} needs {needs}")
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


@contextmanager
def precision(name: str, device: str, reason: str = "device cpu") -> Iterator[None]:
    """What a GPU rounds within the block. "fp32": nothing; "tf32": the factors in matrix products
    of float32, to TF32's 10 bits of mantissa; "bf16": what an encoder's layers pass on, to
    bfloat16's 7. Sums, statistics, weights and, with bf16, the head and the loss stay float32.
    reason: why it is this device, for the message.

    Raises ConfigError if that is impossible: on a CPU, on GPUs before Ampere and, for bf16,
    without the kernels or the type.
    """
    if name == "fp32":
        yield
        return
    if device == "cpu":
        raise ConfigError(f"precision {name} needs a GPU, and this is a CPU ({reason}): use fp32")
    xp, index = cupy(), int(device.removeprefix("cuda:"))
    if int(xp.cuda.Device(index).compute_capability) < 80:
        raise ConfigError(f"precision {name} needs a GPU of compute capability 8.0 or more")
    kind = bfloat16() if name == "bf16" else None
    try:  # not public; the public CUPY_TF32 in the environment is read only once
        switch, types = xp._core.set_compute_type, xp._core._routines_linalg
        tf32, before = types.COMPUTE_TYPE_TF32, types.get_compute_type(np.float32)
    except AttributeError as error:
        raise ConfigError(f"precision {name}: CuPy {xp.__version__} has no such switch") from error
    switch(np.float32, tf32 if name == "tf32" else before)
    token = activations.set(kind)
    try:
        yield
    finally:
        activations.reset(token)
        switch(np.float32, before)


def synchronize(device: str) -> None:
    """Wait until `device` has done all it was asked to."""
    if device != "cpu":
        cupy().cuda.get_current_stream().synchronize()


_pool_peak = 0  # bytes; a pool forgets what it has given back


@contextmanager
def sized_by_first(device: str) -> Iterator[None]:
    """Within the block, the first of many equal steps, a GPU's memory pool holds only what is in
    use; afterwards it keeps, in one piece, the most that was in use and no longer is.

    By itself it takes about a quarter more. Arrays that outlive the block hold on to their pieces.
    """
    pool = None if device == "cpu" else cupy().get_default_memory_pool()
    if pool is None or cupy().cuda.get_allocator() != pool.malloc:  # someone else's, or no pool
        yield
        return
    most, limit = 0, pool.get_limit()

    def malloc(size: int) -> Any:
        nonlocal most
        global _pool_peak
        most = max(most, pool.used_bytes() + size)
        pool.set_limit(pool.total_bytes())
        try:
            return pool.malloc(size)
        except MemoryError:  # nothing fits
            pool.free_all_blocks()  # CuPy 13 has not tried this by itself
            pool.set_limit(limit)
            return pool.malloc(size)
        finally:
            pool.set_limit(limit)
            _pool_peak = max(_pool_peak, pool.total_bytes())

    gc.freeze()  # or CuPy would look through all that lives whenever the pool is to grow
    try:
        with cupy().cuda.using_allocator(malloc):
            yield
    finally:
        gc.unfreeze()
    pool.free_all_blocks()
    with suppress(MemoryError):  # the pool then grows as usual
        pool.malloc(max(0, most - pool.used_bytes()))  # given back to the pool at once


def peak_memory(device: str) -> int:
    """Most bytes held so far: resident set of the process, or the GPU's memory pool."""
    if device != "cpu":
        return max(_pool_peak, cupy().get_default_memory_pool().total_bytes())
    return peak_resident()
