"""How a kernel of a .cu file is compiled, on first use, and launched."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import Array, cupy

CHANNELS, LANES, THREADS = 32, 8, 256  # of a block: of kernels that work by rows, of the others
REALS = {"bfloat16": "bfloat16", "float64": "double"}  # what REAL is for an array; else float


@cache
def module(library: Any, file: str, real: str) -> Any:
    code = Path(__file__).with_name(f"{file}.cu").read_text()
    include, header = '#include "real.cuh"', Path(__file__).with_name("real.cuh").read_text()
    if code.startswith(include):  # here, as the compiler at run time sees no files
        code = f"#define REAL {real}\n{header}#line 2\n" + code.removeprefix(f"{include}\n")
    return library.RawModule(code=code)


@cache
def function(library: Any, file: str, kernel: str, real: str) -> Any:
    return module(library, file, real).get_function(kernel)


def is_bfloat16(x: Array) -> bool:
    return x.dtype.name == "bfloat16"


def launch(file: str, kernel: str, grid: tuple, block: tuple, *args: Any) -> None:
    """Run a kernel, of the type of its first array; numbers become what C calls int and float, None
    a null pointer.
    """
    xp = cupy()
    convert: Any = {int: np.int32, float: np.float32, xp.ndarray: xp.ascontiguousarray}
    convert |= {type(None): lambda _: np.intp(0), bool: xp.asarray, np.bool_: xp.asarray}
    given = tuple(convert.get(type(a), lambda a: a)(a) for a in args)
    function(xp, file, kernel, REALS.get(args[0].dtype.name, "float"))(grid, block, given)


def for_each_row(file: str, kernel: str, x: Array, *others: Array, geometry: tuple) -> Array:
    """Fill the last array, (..., K), a row of K numbers at a time."""
    rows = others[-1].size // others[-1].shape[-1]
    given = x, *others, rows, *sum(geometry, ())
    launch(file, kernel, (-(-rows // LANES),), (CHANNELS, LANES), *given)
    return others[-1]
