"""How a kernel of a .cu file is compiled, on first use, and launched."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import Array, cupy

# Of a block: 32 x 8 in kernels that work by rows (merge_tiles: 32 x 32), else 256.
CHANNELS, LANES, THREADS = 32, 8, 256
REALS = {2: "bfloat16", 8: "double"}  # what REAL is, by the bytes of a number; else float


@cache
def module(library: Any, file: str, real: str) -> Any:
    code = Path(__file__).with_name(f"{file}.cu").read_text()
    include, header = '#include "real.cuh"', Path(__file__).with_name("real.cuh").read_text()
    if code.startswith(include):  # put in here, as the run-time compiler sees no files
        code = f"#define REAL {real}\n{header}#line 2\n" + code.removeprefix(f"{include}\n")
    return library.RawModule(code=code)


@cache
def function(library: Any, file: str, kernel: str, real: str) -> Any:
    return module(library, file, real).get_function(kernel)


@cache
def conversions(library: Any) -> dict[type, Any]:
    """How to turn a value of each of these types into what a kernel takes."""
    convert = {int: np.int32, float: np.float32, library.ndarray: library.ascontiguousarray}
    convert |= {bool: library.asarray, np.bool_: library.asarray, np.float64: np.float32}
    return convert | {type(None): lambda _: np.intp(0)}


def is_bfloat16(x: Array) -> bool:
    return x.itemsize == 2  # float16 does not come this far; comparing type names is slow


def launch(file: str, kernel: str, grid: tuple, block: tuple, *args: Any) -> None:
    """Run a kernel, compiled for the type of its first array; numbers become C's int and float,
    None a null pointer.
    """
    xp, real = cupy(), REALS.get(args[0].itemsize, "float")
    convert = conversions(xp)
    given = [convert[type(a)](a) if type(a) in convert else a for a in args]
    if 0 not in grid:  # of no images: CUDA refuses to launch no blocks
        function(xp, file, kernel, real)(grid, block, tuple(given))


def for_each_row(file: str, kernel: str, x: Array, *others: Array, geometry: tuple) -> Array:
    """Fill the last array, (..., K), a row of K numbers at a time."""
    rows = others[-1].size // others[-1].shape[-1]
    given = x, *others, rows, *sum(geometry, ())
    launch(file, kernel, (-(-rows // LANES),), (CHANNELS, LANES), *given)
    return others[-1]
