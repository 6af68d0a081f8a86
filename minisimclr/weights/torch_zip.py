"""PyTorch's .pth files, read without PyTorch and without running anything in them.

Such a file is a zip archive (since PyTorch 1.6): `data.pkl` says which tensor is which part of
which storage; `data/0`, `data/1`, ... are the storages' bytes. A pickle is a program, and Python's
own interpreter for it can be made to import and call anything. This one knows the few instructions
that make state dicts, and functions only as names: three have a meaning, others end the reading.
"""

import pickletools
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .stored import NAME_LIMIT, Spec, Stored, checked, decode

DTYPES = {
    "Half": "float16", "BFloat16": "bfloat16", "Float": "float32", "Double": "float64",
    "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
    "Bool": "bool",
}  # fmt: skip
CONVERT = "{}; convert it: python -c \"import torch; torch.save({}, 'NEW.pth')\""

Name = namedtuple("Name", "text")  # of a class or function, "module name"; never looked up
Storage = namedtuple("Storage", "dtype key")
Tensor = namedtuple("Tensor", "storage offset shape strides")  # counted in numbers, not bytes

# How many values an instruction takes from the stack; None: all since the last mark.
TAKES: dict[str, int | None] = {
    "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "REDUCE": 2, "BUILD": 1, "APPEND": 1, "SETITEM": 2,
    "BINPERSID": 1, "STOP": 1, "TUPLE": None, "APPENDS": None, "SETITEMS": None,
}  # fmt: skip


def read(path: Path) -> Stored:
    """Raises ValueError, LookupError, TypeError, RecursionError or what zipfile raises."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        packed = any(m.compress_type or m.flag_bits & 1 for m in archive.infolist())
        roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
        if packed or len(set(names)) < len(names) or len(roots) != 1:
            raise ValueError("no PyTorch archive: members are compressed, doubled or missing")
        if any(name.startswith(f"{roots[0]}code/") for name in names):
            script = "torch.jit.load('OLD.pth', 'cpu').state_dict()"
            raise ValueError(CONVERT.format("TorchScript, which holds code", script))
        if any(archive.read(n) != b"little" for n in names if n.endswith("/byteorder")):
            raise ValueError("numbers are not little-endian")
        tree = unpickle(archive.read(f"{roots[0]}data.pkl"))
    tensors = dict(named_tensors(tree, "", set()))

    def fetch(name: str) -> np.ndarray:
        (dtype, key), offset, shape, strides = tensors[name]
        with zipfile.ZipFile(path) as archive:
            numbers = decode(archive.read(f"{roots[0]}data/{key}"), Spec((-1,), dtype))
        start, *steps = (numbers.itemsize * n for n in checked((offset, *strides)))
        # NumPy raises where the view would leave its storage.
        return np.ndarray(shape, numbers.dtype, numbers, start, steps).copy()

    specs = {name: Spec(checked(t.shape), t.storage.dtype) for name, t in tensors.items()}
    return Stored(path, "PyTorch zip", specs, fetch)


def named_tensors(tree: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Tensors in nested dictionaries by their keys, joined with dots; all else is left out."""
    if isinstance(tree, Tensor):
        yield prefix, tree
    elif isinstance(tree, dict):
        if id(tree) in seen or len(prefix) + max(map(len, tree), default=0) > NAME_LIMIT:
            raise ValueError("a dictionary that stands in two places, or a name that is too long")
        seen.add(id(tree))
        for key, value in tree.items():
            yield from named_tensors(value, f"{prefix}.{key}" if prefix else key, seen)


def unpickle(program: bytes) -> Any:
    """What the pickle builds, of dictionaries, tuples, numbers, texts and Tensors."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    for instruction, argument, _ in pickletools.genops(program):
        name = instruction.name
        start = marks.pop() if (n := TAKES.get(name, 0)) is None else len(stack) - n
        taken, stack[start:] = stack[start:], []
        match name:
            case "PROTO" | "APPEND" | "APPENDS" | "BUILD":
                pass  # the content of lists and the attributes of objects are not needed
            case "MARK":
                marks.append(len(stack))
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_LIST":
                stack.append(None)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3" | "TUPLE":
                stack.append(tuple(taken))
            case "SETITEM" | "SETITEMS":
                pairs = zip(taken[::2], taken[1::2], strict=True)
                dict.update(stack[-1], {k: value for k, value in pairs if type(k) is str})
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(Name(argument))
            case "REDUCE" | "BINPERSID":
                stack.append(meaning(*taken))
            case "STOP":
                return taken[0]
            case _:
                raise ValueError(f"pickle instruction {name}, which state dicts do without")
    raise ValueError("the pickle does not end")


def meaning(*parts: Any) -> Any:
    """What the three known functions make of their arguments; what a storage's id stands for."""
    match parts:
        case Name("collections OrderedDict"), ():
            return {}
        case Name("torch._utils _rebuild_parameter"), (Tensor() as tensor, *_):
            return tensor
        case Name("torch._utils _rebuild_tensor_v2"), (Storage() as s, offset, shape, steps, _, _):
            return Tensor(s, offset, shape, steps)  # a seventh would say: negated or conjugated
        case (("storage", Name(text), str() as key, *_),):
            return Storage(DTYPES[text.removeprefix("torch ").removesuffix("Storage")], key)
    name = getattr(parts[0], "text", "something unknown")[:100]
    raise ValueError(f"it calls {name!a}: save model.state_dict() alone")
