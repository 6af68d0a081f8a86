"""The house keeps its order: imports go down, fences hold, budgets are kept."""

import ast
import io
import json
import os
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import minisimclr

PACKAGE = Path(minisimclr.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# From the ground up; within a floor, a room may import those to its right.
FLOORS = [
    ["files", "errors"],
    ["backend", "cores"],
    ["tensor", "data", "schedule", "config"],
    ["ops", "augment"],
    ["simclr", "nn", "optim"],
    ["kernels"],
    [
        *("report", "compare", "baseline", "finetune", "doctor", "embed", "train"),
        *("probe", "profile", "run", "weights", "checkpoint"),
    ],
    ["cli"],
]
FENCES = {
    "cupy": ("backend", "kernels/cuda"),
    "cupyx": ("backend", "kernels/cuda"),
    "h5py": ("data/cache", "checkpoint", "weights"),
    "PIL": ("data", "report"),
    "matplotlib": ("report",),
    "click": ("cli",),
    "ml_dtypes": ("backend",),
    "torch": (),
    "scipy": (),
    "sklearn": (),
}
TEACHES = ("tensor", "ops", "nn", "optim", "schedule", "augment", "simclr", "probe")


def rank(room: str) -> tuple[int, int]:
    for height, floor in enumerate(FLOORS):
        if room in floor:
            return height, -floor.index(room)
    raise AssertionError(f"{room} has no place in the house: give it one in FLOORS")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Full names of the modules a file imports, relative ones resolved."""
    package = ["minisimclr", *path.relative_to(PACKAGE).parts[:-1]]
    names = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [module] if node.module else [f"{module}.{a.name}" for a in node.names]
    return names


def upward_imports(path: Path, names: list[str]) -> list[str]:
    room = room_of(path)
    package = "minisimclr.__version__"  # a constant, and no room
    inside = [n.split(".")[1] for n in names if n.startswith("minisimclr.") and n != package]
    return [other for other in inside if other != room and rank(other) >= rank(room)]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    if path.parent == PACKAGE and path.stem in ("__init__", "__main__"):
        return
    assert not upward_imports(path, imports(path))


def test_imports_are_found():
    assert "cupy" in imports(PACKAGE / "backend.py")
    assert "minisimclr.backend" in imports(PACKAGE / "tensor.py")
    assert "minisimclr.ops.conv" in imports(PACKAGE / "kernels" / "conv.py")
    assert {"minisimclr.baseline", "click"} < set(imports(PACKAGE / "cli" / "baseline.py"))


def test_an_upward_import_is_caught():
    assert upward_imports(PACKAGE / "tensor.py", ["minisimclr.nn.layers"]) == ["nn"]
    assert upward_imports(PACKAGE / "nn" / "x.py", ["minisimclr.simclr"]) == ["simclr"]
    assert not upward_imports(PACKAGE / "simclr.py", ["minisimclr.nn", "minisimclr.optim"])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_fences(path):
    where = path.relative_to(PACKAGE).as_posix()
    for name in imports(path):
        library = name.split(".")[0]
        if library in FENCES:
            assert where.startswith(FENCES[library] or "nowhere"), f"{where} imports {library}"


def code_lines(source: str) -> int:
    """Lines with code on them: no blanks, comments or docstrings."""
    skip = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
            tokenize.ENDMARKER, tokenize.ENCODING)  # fmt: skip
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skip:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            text = body[0].value
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                lines.difference_update(range(text.lineno, text.end_lineno + 1))
    return len(lines)


def test_code_lines_counts_code_only():
    assert code_lines('"""Doc."""\n\n# why\nx = 1  # because\ny = [\n    2,\n]\n') == 4


def test_budget():
    count: dict[str, int] = {}
    for path in FILES:
        count[room_of(path)] = count.get(room_of(path), 0) + code_lines(path.read_text("utf-8"))
    kernels = count.pop("kernels", 0)
    for path in PACKAGE.glob("kernels/*.cu*"):  # whose comments are whole lines
        lines = (line.strip() for line in path.read_text("utf-8").splitlines())
        kernels += sum(bool(line) and not line.startswith("//") for line in lines)
    assert kernels <= 1196
    assert count.pop("weights", 0) <= 488
    pages = [*PACKAGE.glob("report/*.css"), *PACKAGE.glob("report/*.html")]
    assert count.pop("report") + sum(len(p.read_text("utf-8").splitlines()) for p in pages) <= 1147
    assert sum(count.get(room, 0) for room in TEACHES) <= 1806, count
    assert count.pop("data") <= 1362  # every fault of archives, pictures, caches, downloads
    assert count.pop("cli") <= 841
    # The report's three systems.
    assert sum(count.pop(room) for room in ("baseline", "compare", "embed", "finetune")) <= 691
    assert sum(count.values()) <= 3258, count


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_short(path):
    lines = path.read_text("utf-8").splitlines()
    assert len(lines) <= 300
    assert max(map(len, lines), default=0) <= 100


def test_what_is_public_is_shown():
    assert set(minisimclr.__all__) <= set(dir(minisimclr))
    assert len(set(dir(minisimclr))) == len(dir(minisimclr))
    script = "import minisimclr as ms; ms.embed.open_trained; [getattr(ms, n) for n in ms.__all__]"
    subprocess.run([sys.executable, "-c", script], check=True)  # nothing is imported before


def test_heavy_libraries_wait():
    """`--help` must not pay for what a command may never use."""
    script = "import sys, minisimclr.cli; print([m for m in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    for library in ("h5py", "PIL", "matplotlib", "cupy", "torch"):
        assert f"'{library}'" not in loaded.stdout


USER = """
import numpy as np
import minisimclr as ms
from minisimclr import embed, nn


class Double(ms.Function):
    def forward(self, x):  # type: ignore[no-untyped-def]
        return 2 * x


class Gate(nn.Module):
    def __init__(self) -> None:
        self.scale = ms.Parameter(np.ones(3, np.float32))

    def forward(self, x: ms.Tensor, y: ms.Tensor) -> ms.Tensor:
        return x * self.scale + y


t = ms.Tensor(np.ones(3), requires_grad=True)
y = Gate()(t, Double()(t)) * 2 - np.ones(3) * t.relu() / 3
y.backward(np.ones(3))
run = ms.pretrain(ms.TrainConfig(epochs=1), "runs/x")
ms.finetune.finetune(run, ms.embed.open_data(run, None))
ms.report.read("runs/x")
ms.embed.open_weights("w.safetensors", None)
ms.train.resume("runs/x")
embed.open_trained("runs/x")
embed.open_encoder("runs/x")
"""


def test_types_fit_what_users_write(tmp_path):
    api = pytest.importorskip("mypy.api")
    user = tmp_path / "user.py"
    user.write_text(USER + "(np.ones(3) * t).no_such_thing\n")  # the one mistake
    config = str(PACKAGE.parent / "pyproject.toml")
    how = ["--strict", "--config-file", config, "--cache-dir", os.devnull]
    out, _, _ = api.run([*how, str(user)])
    assert [line.partition("error: ")[2] for line in out.splitlines()[:-1]] == [
        '"Tensor" has no attribute "no_such_thing"  [attr-defined]'
    ], out


def test_the_saved_baseline_has_every_benchmark():
    benchmarks = Path(__file__).parents[1] / "benchmarks"
    files = [benchmarks / "test_ops.py", benchmarks / "test_augment.py"]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *files]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=benchmarks.parent).stdout
    saved = json.loads((benchmarks / "baseline.json").read_text())["benchmarks"]
    assert {b["fullname"] for b in saved} == {n for n in listed.splitlines() if "::" in n}
