"""A stand-in for cupy.RawModule that compiles the text of a .cu file for the CPU (cuda_host.h).

Arguments must be what CUDA expects: as many as the kernel has, arrays contiguous and of its types,
numbers of exactly its size. A mistake here, which on a GPU would read garbage, is an error.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np

HEADER = Path(__file__).with_name("cuda_host.h")
KERNEL = re.compile(r'extern "C" __global__ void (\w+)\(([^)]*)\)')
NUMBERS = {"int": np.int32, "long long": np.int64, "float": np.float32}
ARRAYS = {"float": np.float32, "unsigned char": np.uint8, "bool": np.bool_}
ARRAYS |= {"bfloat16": np.dtype(ml_dtypes.bfloat16), "double": np.float64}
# Arrays of anything else are bytes.

#: order: of the threads; ignored_line: that of a barrier to leave out; sanitize: use
#: AddressSanitizer; plant: (old, new), a mistake to make in the text
settings = SimpleNamespace(order=0, ignored_line=0, sanitize=False, plant=("", ""))


def available():
    return sys.platform == "linux" and shutil.which("g++") is not None  # sections as in ELF


@cache
def compiled(code, sanitize):
    """The shared library made of a .cu file."""
    folder = tempfile.TemporaryDirectory(prefix="minisimclr-")
    source, library = (Path(folder.name) / name for name in ("kernels.cpp", "kernels.so"))
    entries = [
        f'extern "C" const char* host_{name}(const unsigned* shape, int order, int ignored, '
        f"void** args) {{ return host::launch({name}, shape, order, ignored, args); }}"
        for name, _ in KERNEL.findall(code)
    ]
    text = [f'#include "{HEADER}"', '#line 1 "kernels.cu"', code, *entries]
    source.write_text("\n".join(text))
    flags = ["-fsanitize=address", "-g"] if sanitize else []
    flags += ["-march=native", "-ffp-contract=fast"]
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", *flags, "-o", library, source]
    env = {**os.environ, "LD_PRELOAD": ""}  # AddressSanitizer is for us, not for the compiler
    built = subprocess.run(command, capture_output=True, text=True, env=env)
    assert built.returncode == 0, built.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.folder = folder  # kept as long as the library
    return loaded


class HostModule:
    """cupy.RawModule(code=...)"""

    def __init__(self, code):
        self.code = code.replace(*settings.plant) if settings.plant[0] in code else code

    def get_function(self, name):
        (parameters,) = (p for n, p in KERNEL.findall(self.code) if n == name)
        for real in re.findall(r"#define REAL (\w+)", self.code)[:1]:
            parameters = parameters.replace("REAL", real)
        types = [
            re.sub(r"\s*(__restrict__)?\s*\w+$", "", p.strip()).removeprefix("const ")
            for p in parameters.split(",")
        ]

        def call(grid, block, args):
            assert len(args) == len(types), f"{name}: {len(args)} arguments for {len(types)}"
            values = [checked(f"{name}({t})", t, a) for t, a in zip(types, args, strict=True)]
            shape = [*grid, 1, 1][:3] + [*block, 1, 1][:3]
            assert all(type(n) is int and n > 0 for n in shape), f"{name}: launch of {shape}"
            assert shape[1] < 65536 and shape[2] < 65536 and np.prod(shape[3:]) <= 1024
            run = getattr(compiled(self.code, settings.sanitize), f"host_{name}")
            run.restype = ctypes.c_char_p
            pointers = (ctypes.c_void_p * len(values))(*(v.ctypes.data for v in values))
            problem = run(
                (ctypes.c_uint * 6)(*shape), settings.order, settings.ignored_line, pointers
            )
            if problem:
                raise RuntimeError(f"{name}: {problem.decode()}")

        return call


def checked(what, kind, value):
    """The bytes of one argument, as an array of one element."""
    if not kind.endswith("*"):
        assert type(value) is NUMBERS[kind], f"{what} given {type(value).__name__}"
        return np.array([value])
    if type(value) is np.intp:
        assert value == 0, f"{what} given a number for a pointer"
        return np.array([value])
    dtype = ARRAYS.get(kind.removesuffix("*").strip(), np.uint8)
    assert value.dtype == dtype, f"{what} given {value.dtype}"
    assert value.flags.c_contiguous, f"{what} given an array with gaps"
    assert value.data.ptr % value.dtype.itemsize == 0, f"{what} given an array at an odd address"
    return np.array([value.data.ptr], np.uintp)
