"""CuPy over NumPy, as strict as a machine with a GPU: for tests on machines without one.

`install` puts a module `cupy` in place whose arrays live in host memory but behave as if they did
not: they refuse every silent way to the host (np.asarray, NumPy's functions, NumPy arrays as
operands, indices or values), and `syncs` notes every explicit one that makes the host wait (float,
bool, get, a boolean mask as an index, ...). It has only functions from a list taken from CuPy 14,
so using one that only NumPy has is an error. Where CuPy silently copies NumPy arrays, this module
refuses them: such a copy in a training loop is a leak, too.
"""

import ctypes
import operator
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import ml_dtypes
import numpy as np

METHODS = """all any argmax argmin argsort clip copy cumsum diagonal dot fill flatten
max mean min prod ravel repeat reshape round squeeze sum swapaxes take trace transpose view
astype"""
FUNCTIONS = """abs add all any arange argmax argmin argsort ascontiguousarray bincount
broadcast_to ceil clip concatenate copysign cumsum divide dot einsum empty empty_like equal exp
expand_dims expm1 eye fill_diagonal floor full full_like greater isfinite isinf isnan less log log1p
logical_and logical_not logical_or logical_xor matmul max maximum mean min minimum moveaxis multiply
negative ones ones_like outer pad prod ravel repeat reshape rint roll sign split sqrt square stack
subtract sum swapaxes take take_along_axis tanh tensordot tile trace transpose tril triu vdot
where zeros zeros_like"""
LINALG = "cholesky eigh eigvalsh norm qr slogdet solve svd"
TYPES = "bool_ float16 float32 float64 int8 int16 int32 int64 intp uint8 uint16 uint32 uint64"
WAITING_FUNCTIONS = "argwhere flatnonzero histogram nonzero unique"  # bincount, too
BINARY = "add sub mul truediv floordiv mod pow matmul rshift and or xor lt le eq ne gt ge"
PLACES = """RawModule add.types asarray asnumpy array cuda.Device.use cuda.Event.synchronize
cuda.Stream.record cuda.Stream.wait_event
cuda.cublas.CUBLAS_COMPUTE_32F cuda.cublas.CUBLAS_GEMM_DEFAULT_TENSOR_OP cuda.cublas.gemmEx
cuda.cublas.sgemmStridedBatched
cuda.get_cublas_handle cuda.runtime.CUDA_R_16BF cuda.runtime.CUDA_R_32F
cuda.get_allocator cuda.using_allocator
cuda.get_current_stream cuda.get_elapsed_time cuda.runtime.getDeviceCount get_default_memory_pool
cuda.runtime.getDeviceProperties ndarray.get _core.set_compute_type is_available
_core._routines_linalg.COMPUTE_TYPE_TF32 _core._routines_linalg.get_compute_type"""
ON_DEVICE = "NumPy array given to CuPy: copy it with asarray first"


class Counter:
    """What a run did: `syncs` and `uploads` by the host, the `order` of streams, in words, and the
    `devices` that `with` chose.
    """

    def __init__(self):
        self.syncs, self.uploads, self.devices, self.waits, self.order = [], [], [], 0, []

    def clear(self):
        self.__init__()


def build(launcher=None):
    """A new module `cupy` (and `cupyx`) with its own array type.

    launcher: what to use as RawModule; without one, kernels do nothing.
    """
    counter, current = Counter(), []

    def lower(value):
        """Host values of device arrays, also within lists and dictionaries."""
        if isinstance(value, ndarray):
            return value._host
        if isinstance(value, np.ndarray):
            raise TypeError(ON_DEVICE)
        if isinstance(value, (list, tuple)):
            return type(value)(lower(v) for v in value)
        return value

    def lift(value):
        if isinstance(value, (np.ndarray, np.generic)):
            return ndarray(np.asarray(value))
        if isinstance(value, (list, tuple)):
            return (list if isinstance(value, list) else tuple)(map(lift, value))
        return value

    def forward(function, waits=""):
        def call(*args, **kwargs):
            if waits:
                counter.syncs.append(waits)
            out = kwargs.get("out")
            result = function(*map(lower, args), **{k: lower(v) for k, v in kwargs.items()})
            return out if isinstance(out, ndarray) else lift(result)

        return call

    class ndarray:
        __array_priority__ = 100

        def __init__(self, host):
            self._host = host

        def __array__(self, *args, **kwargs):
            raise TypeError("Implicit conversion to a NumPy array is not allowed")

        def __array_function__(self, function, *rest):
            raise TypeError(f"numpy.{function.__name__} of a device array")

        def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
            if method == "__call__" and isinstance(inputs[0], np.generic):  # np.float32(2) * array
                return lift(ufunc(*map(lower, inputs), **kwargs))
            raise TypeError(f"numpy.{ufunc.__name__} of a device array")

        shape = property(lambda self: self._host.shape)
        dtype = property(lambda self: self._host.dtype)
        ndim = property(lambda self: self._host.ndim)
        size = property(lambda self: self._host.size)
        nbytes = property(lambda self: self._host.nbytes)
        itemsize = property(lambda self: self._host.itemsize)
        strides = property(lambda self: self._host.strides)
        T = property(lambda self: lift(self._host.T))
        base = property(lambda self: self._host if self._host.base is None else self._host.base)
        data = property(lambda self: SimpleNamespace(ptr=self._host.ctypes.data))

        @property
        def flags(self):
            flags = self._host.flags
            return SimpleNamespace(
                c_contiguous=flags.c_contiguous, f_contiguous=flags.f_contiguous,
                owndata=flags.owndata,
            )  # fmt: skip

        def __len__(self):
            return len(self._host)

        def __iter__(self):
            return (self[i] for i in range(len(self)))

        def __getitem__(self, key):
            key = key if isinstance(key, tuple) else (key,)
            if any(isinstance(k, ndarray) and k.dtype == bool for k in key):
                counter.syncs.append("boolean index")
            host = lower(refuse_lists(key))
            if not any(isinstance(k, (np.ndarray, type(Ellipsis))) for k in host):
                host = (*host, Ellipsis)  # a single number is a view, too
            return lift(self._host[host])

        def __setitem__(self, key, value):
            key = key if isinstance(key, tuple) else (key,)
            if any(isinstance(k, ndarray) and k.dtype == bool for k in key):
                counter.syncs.append("boolean index")
            self._host[lower(refuse_lists(key))] = lower(refuse_lists((value,))[0])

        def get(self, stream=None, order="C", out=None, blocking=True):
            if blocking:
                counter.syncs.append("get")
                return self._host.copy()
            if not is_pinned(out):
                raise AssertionError("an asynchronous copy needs pinned memory")
            out.fill(np.nan)  # code that does not wait finds this
            stream.queue.append((out, self._host.copy()))
            return out

        def __repr__(self):
            counter.syncs.append("repr")
            return f"device{self._host!r}"

        __hash__ = None

    def refuse_lists(key):
        if any(isinstance(k, list) for k in key):
            raise TypeError("a list given to CuPy: make it an array once, outside the loop")
        return key

    def unary(name):
        f = getattr(operator, name)
        return lambda self: lift(f(self._host))

    def binary(name, swap):
        f = getattr(operator, f"{name}_" if name in ("and", "or") else name)

        def method(self, other):
            if type(other).__name__ == "Tensor" or isinstance(other, (list, tuple)):
                return NotImplemented
            a, b = self._host, lower(other)
            return lift(f(b, a) if swap else f(a, b))

        return method

    def in_place(name):
        f = getattr(operator, f"i{name}")

        def method(self, other):
            f(self._host, lower(other))
            return self

        return method

    for name in BINARY.split():
        setattr(ndarray, f"__{name}__", binary(name, swap=False))
        if name not in ("lt", "le", "eq", "ne", "gt", "ge"):
            setattr(ndarray, f"__r{name}__", binary(name, swap=True))
            setattr(ndarray, f"__i{name}__", in_place(name))
    for name in ("neg", "pos", "abs", "invert"):
        setattr(ndarray, f"__{name}__", unary(name))
    for name in METHODS.split():
        setattr(ndarray, name, forward(getattr(np.ndarray, name)))
    # Without dtype: told one, CuPy still subtracts a mean of the array's own.
    ndarray.std = lambda self, axis=None: lift(self._host.std(axis))
    for name, kind in {"float": float, "int": int, "bool": bool, "index": operator.index}.items():

        def convert(self, name=name, kind=kind):
            counter.syncs.append(name)
            return kind(self._host)

        setattr(ndarray, f"__{name}__", convert)
    for name in ("item", "tolist", "nonzero", "tobytes"):
        setattr(ndarray, name, forward(getattr(np.ndarray, name), waits=name))

    # The library.
    cupy, cupyx = ModuleType("cupy"), ModuleType("cupyx")
    cupy.ndarray, cupy.counter, cupy.__version__ = ndarray, counter, "14.0.fake"
    for name in FUNCTIONS.split():
        waits = "bincount" if name == "bincount" else ""  # looks for the largest number
        setattr(cupy, name, forward(getattr(np, name), waits))
    cupy.add.types = ["ee->e", "EE->E", "ff->f"]
    cupy.add.at = forward(np.add.at)
    for name in WAITING_FUNCTIONS.split():
        setattr(cupy, name, forward(getattr(np, name), waits=name))
    for name in (*TYPES.split(), "inf", "nan", "pi", "newaxis"):
        setattr(cupy, name, getattr(np, name))
    cupy.linalg = SimpleNamespace(**{n: forward(getattr(np.linalg, n)) for n in LINALG.split()})

    def asarray(value, dtype=None, order=None):
        if isinstance(value, ndarray):
            return value if dtype in (None, value.dtype) else value.astype(dtype)
        counter.uploads.append(np.shape(value))
        counter.order.append(f"upload by {current[-1].name}")
        x = ndarray(np.array(value, dtype=dtype, order=order or "K"))
        if current[-1].name == "side":
            current[-1].queue.append((x._host, x._host.copy()))
            x._host.fill(77)  # code that does not wait finds this
        return x

    def asnumpy(value):
        return value.get() if isinstance(value, ndarray) else np.asarray(value)

    cupy.asarray, cupy.asnumpy = asarray, asnumpy
    cupy.array = lambda value, dtype=None: asarray(value, dtype).copy()

    # The device. What is copied in a stream arrives when somebody waits for a later event in it.
    class Event:
        def __init__(self, stream=None):
            self.stream, self.queue = stream, list(stream.queue) if stream else []

        def record(self, stream=None):
            self.__init__(stream or current[-1])

        def arrive(self):
            for out, values in self.queue:
                out[...] = values

        def synchronize(self):
            counter.waits += 1
            self.arrive()

    class Stream:
        def __init__(self, non_blocking=False):
            self.queue, self.name = [], "side" if current else "main"
            assert non_blocking or not current, "it would wait for the stream that computes"

        def record(self, event=None):
            done = Event(self)
            self.queue = []
            return done

        def synchronize(self):
            counter.syncs.append("stream")
            self.record().arrive()

        def wait_event(self, event):
            counter.order.append(f"{self.name} waits for {event.stream.name}")
            event.arrive()

        def __enter__(self):
            current.append(self)
            return self

        def __exit__(self, *exception):
            current.pop()

    class Device:
        def __init__(self, index=0):
            self.id, self.compute_capability = index, "90"

        def __enter__(self):
            counter.devices.append(self.id)
            return self

        def __exit__(self, *exception):
            return None

        def use(self):
            cupy.device_in_use = self.id
            return self

    pinned = []

    def empty_pinned(shape, dtype=float, order="C"):
        pinned.append(np.empty(shape, dtype, order))
        del pinned[:-1000]
        return pinned[-1]

    def is_pinned(array):
        return any(array is p for p in pinned)

    class Idle:
        """A module whose kernels do nothing, but for the one with which a GPU is tried."""

        def __init__(self, code):
            pass

        def get_function(self, name):
            return lambda grid, block, args: args[0].__imul__(2) if name == "twice" else None

    current.append(Stream())
    properties = {"name": b"Fake", "totalGlobalMem": 1 << 30}
    cupy.cuda = SimpleNamespace(
        Device=Device, Stream=Stream, Event=Event, get_current_stream=lambda: current[-1],
        get_elapsed_time=lambda start, stop: 1.0, get_cublas_handle=lambda: 4711,
        cublas=SimpleNamespace(
            gemmEx=gemm, sgemmStridedBatched=gemm_strided,
            CUBLAS_COMPUTE_32F=68, CUBLAS_GEMM_DEFAULT_TENSOR_OP=99,
        ),
        runtime=SimpleNamespace(
            getDeviceCount=lambda: 1, driverGetVersion=lambda: 13000,
            runtimeGetVersion=lambda: 13000, getDeviceProperties=lambda index: properties,
            CUDA_R_32F=0, CUDA_R_16BF=14,
        ),
    )  # fmt: skip
    cupy.RawModule = launcher or Idle
    cupy.compute_type = 1
    cupy._core = SimpleNamespace(
        set_compute_type=lambda dtype, kind: setattr(cupy, "compute_type", kind),
        _routines_linalg=SimpleNamespace(
            COMPUTE_TYPE_TF32=7, get_compute_type=lambda dtype: cupy.compute_type
        ),
    )
    cupy.is_available = lambda: True
    pool = Pool()
    cupy.get_default_memory_pool = lambda: pool
    cupy.cuda.get_allocator = lambda: cupy.allocator
    cupy.cuda.using_allocator = pool.using
    cupy.allocator = pool.malloc
    cupyx.empty_pinned = empty_pinned
    return cupy, cupyx


class Pool:
    """Half a MiB, of which half is in use; no array takes any from it.

    Whoever takes over allocation is asked for 1 KiB, then for half a MiB: twice what is free.
    """

    def __init__(self):
        self.limit, self.limits, self.taken, self.total = 0, [], [], 1 << 19

    def total_bytes(self):
        return self.total

    def used_bytes(self):
        return 1 << 18

    def get_limit(self):
        return self.limit

    def set_limit(self, size):
        self.limit = size
        self.limits.append(size)

    def malloc(self, size):
        if size == 1 << 19 and self.limit:
            raise MemoryError("no such piece")
        self.total += size == 1 << 19 and size
        self.taken.append(size)

    def free_all_blocks(self):
        self.total = 1 << 19
        self.taken.append("free")

    @contextmanager
    def using(self, malloc):
        malloc(1 << 10), malloc(1 << 19)
        yield


def numbers(pointer, columns, ld, kind=0):
    """The float32 (0) or bfloat16 (14) numbers at an address, as an array (columns, ld)."""
    bits, dtype = {0: (ctypes.c_uint32, "f4"), 14: (ctypes.c_uint16, ml_dtypes.bfloat16)}[kind]
    raw = np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(bits)), (columns, ld))
    return raw.view(dtype)


def gemm_strided(handle, ta, tb, m, n, k, alpha, a, lda, a_step, b, ldb, b_step, beta, c, ldc,
                 c_step, count):  # fmt: skip
    """cublasSgemmStridedBatched: C (m, n) = A op(B) + beta C, `count` times, by columns."""
    one, old = (numbers(p, 1, 1)[0, 0] for p in (alpha, beta))
    assert (handle, ta, one) == (4711, 0, 1) and all(type(x) is int for x in (m, n, k, count))
    assert lda >= m and ldb >= (n if tb else k) and ldc >= m
    for i in range(count):
        x = numbers(a + 4 * a_step * i, k, lda)[:, :m].astype(float)  # (k, m)
        y = numbers(b + 4 * b_step * i, k if tb else n, ldb)[:, : n if tb else k].astype(float)
        out = numbers(c + 4 * c_step * i, n, ldc)[:, :m]
        out[...] = (y.T if tb else y) @ x + (old * out if old else 0)  # (n, k) @ (k, m)


def gemm(handle, ta, tb, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta, c, c_type, ldc,
         compute, algorithm):  # fmt: skip
    """cublasGemmEx: C (m, n) = op(A) op(B), matrices by columns, sums in float32."""
    assert (handle, compute, algorithm) == (4711, 68, 99)
    one, zero = (numbers(p, 1, 1)[0, 0] for p in (alpha, beta))
    assert one == 1 and zero == 0 and a_type == b_type
    assert lda >= (k if ta else m) and ldb >= (n if tb else k) and ldc >= m
    x = numbers(a, m if ta else k, lda, a_type)[:, : k if ta else m].astype(np.float32)
    y = numbers(b, k if tb else n, ldb, b_type)[:, : n if tb else k].astype(np.float32)
    result = (x if ta else x.T) @ (y if tb else y.T)  # (m, k) @ (k, n)
    numbers(c, n, ldc, c_type)[:, :m] = result.T


def install(monkeypatch, launcher=None):
    """Put a new fake in place of CuPy until the test ends, and return it."""
    from minisimclr import backend

    cupy, cupyx = build(launcher)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupyx", cupyx)
    monkeypatch.setattr(backend, "cuda_driver", lambda: 13000)
    backend.cupy.cache_clear()
    backend.try_gpu.cache_clear()
    return cupy


def remove():
    """Forget that there was a fake."""
    from minisimclr import backend
    from minisimclr.kernels import cuda_launch

    kept = cuda_launch.module, cuda_launch.function
    for cached in (backend.cupy, backend.try_gpu, *kept):
        cached.cache_clear()
