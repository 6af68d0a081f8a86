"""Everything there is to measure on a GPU, in one command of under ten minutes.

    python benchmarks/gpu.py [--out gpu.json] [--minutes 9]

Runs the tests marked gpu, then measures: the GPU's own ceilings, every kernel beside the readable
pass, convolutions beside cuDNN's, augmentation beside torchvision, LARS beside torch._foreach, and
whole steps beside what the ceilings allow and beside PyTorch. Every part runs in its own process,
so that a failure costs no other part. Writes one JSON after each, so that a run cut short keeps
what it has, and prints one table. Times are medians of CUDA events over inputs taken in turn. Parts
that do not fit into the time left, or need what is not installed, say so. --small is for trying the
script out.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from itertools import product as product_of
from pathlib import Path

import numpy as np

from minisimclr import augment, optim, profile
from minisimclr.backend import activations, cupy, peak_memory, precision, try_gpu
from minisimclr.errors import ConfigError
from minisimclr.files import write_bytes
from minisimclr.kernels.cuda_conv import FF, products
from minisimclr.nn import ENCODERS
from minisimclr.ops import conv, loss, norm, pool
from minisimclr.ops.conv import output_size
from minisimclr.ops.product import matmul
from minisimclr.tensor import Tensor

HERE = Path(__file__).parent
KINDS = ("fp32", "tf32", "bf16")
TURNS = 3  # inputs of a measurement
LONG, SLACK = 250, 15  # seconds: of a part except whole steps; extra before its process is killed


class Sizes:
    """What is measured: full size, or small to try the script out."""

    def __init__(self, small: bool):
        self.rounds = 5 if small else 20
        self.maps = [(8, 3, 5, 40)] if small else [(1024, 32, 32, 64), (512, 28, 28, 512)]
        self.convs = (
            [((2, 6, 6, 4), (3, 3, 4, 5), 1)]
            if small
            else [
                ((1024, 32, 32, 64), (3, 3, 64, 64), 1),
                ((1024, 16, 16, 128), (3, 3, 128, 128), 1),
                ((1024, 32, 32, 64), (3, 3, 64, 128), 2),
                ((512, 56, 56, 64), (1, 1, 64, 256), 1),
            ]
        )
        self.losses = [(4, 8)] if small else [(512, 128), (4096, 128)]
        self.views = [(3, 12, 8)] if small else [(512, 40, 32), (128, 256, 224)]
        self.encoder, self.width = ("resnet_small", 4) if small else ("resnet50", 64)
        full = [("resnet18", 64, 32, 512), ("resnet50", 64, 224, 256)]
        self.steps = [("resnet_small", 4, 8, 4)] if small else full
        self.matrix, self.vector = (64, 1 << 12) if small else (8192, 1 << 28)


def seconds(run, inputs: list[tuple], rounds: int) -> float:
    """Median seconds of run(*inputs[i]), i in turn, on the device.

    Uncounted work that takes a while goes first: while the device is busy with it, the host gets
    ahead, so that the host's own time is not counted as the device's.
    """
    xp = cupy()
    for given in inputs:
        run(*given)
    times = []
    for i in range(rounds):
        start, stop = xp.cuda.Event(), xp.cuda.Event()
        keep_busy()
        start.record()
        run(*inputs[i % len(inputs)])
        stop.record()
        stop.synchronize()
        times.append(xp.cuda.get_elapsed_time(start, stop) / 1e3)
    return statistics.median(times)


BUSY = 1792  # side of matrices whose products, some 10 ms of float32, keep a GPU busy


@cache
def busy(n: int) -> tuple:
    return randn(FF, n, n), cupy().empty((FF, n, n), np.float32)


def keep_busy() -> None:
    """Give the device work for longer than the host needs to launch what is measured next."""
    a, out = busy(BUSY)
    products(a, a, out)  # in float32 under every precision


@cache
def busy_seconds() -> float:
    """How long the host may take to launch what is measured; beyond that its own time counts."""
    start, stop = cupy().cuda.Event(), cupy().cuda.Event()
    keep_busy(), start.record(), keep_busy(), stop.record()
    stop.synchronize()
    return cupy().cuda.get_elapsed_time(start, stop) / 1e3


def usable() -> dict[str, str]:
    """Each precision, with what speaks against it ("": nothing)."""
    against = dict.fromkeys(KINDS, "")
    for kind in KINDS:
        try:
            with precision(kind, "cuda:0"):
                pass
        except ConfigError as error:
            against[kind] = str(error)
    return against


def facts(sizes: Sizes) -> list[dict]:
    command = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    found = {"gpu": try_gpu(0), "python": platform.python_version(), "numpy": np.__version__}
    with suppress(Exception):  # nice to have
        found["cuda_runtime"] = cupy().cuda.runtime.runtimeGetVersion()
        found["nvrtc"] = ".".join(map(str, cupy().cuda.nvrtc.getVersion()))
        found["memory_bytes"] = cupy().cuda.runtime.memGetInfo()[1]
    try:
        import torch

        found["torch"] = torch.__version__
    except ImportError:
        found["torch"] = "not installed"
    return [found | {"date": now, "commit": commit, "command": " ".join(sys.argv)}]


def tests(sizes: Sizes) -> list[dict]:
    """The last line of pytest, and every test that failed."""
    # With names, so that a run that is cut short shows how far it came.
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider"]
    try:
        run = subprocess.run(
            [*command, str(HERE.parent / "tests" / "test_gpu.py")],
            capture_output=True,
            text=True,
            timeout=sizes.left(),
        )
        lines, code = run.stdout.splitlines() or [run.stderr[-500:]], run.returncode
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode(errors="replace").splitlines()
        lines, code = [*said, f"no end after {error.timeout:.0f} s, in {said[-1:]}"], 1
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    failed = failed or [line for line in lines if " FAILED " in line]  # before its summary
    passed = code == 0 and " passed" in lines[-1]  # and not all of them skipped
    return [{"summary": lines[-1], "passed": passed, "failed": failed}]


def product(sizes: Sizes, kind: str) -> float:
    """Flop/s of a matrix product in a precision."""
    n = sizes.matrix
    with precision(kind, "cuda:0"):
        a = randn(n, n).astype(activations.get() or np.float32)
        return 2 * n**3 / seconds(matmul, [(a, a)], sizes.rounds)


def ceilings(sizes: Sizes) -> Iterator[dict]:
    roof = profile.roofline("cuda:0", sizes.matrix, sizes.vector)
    yield {"what": "sum of vectors", "gb_per_second": roof["bytes_per_second"] / 1e9}
    for kind, against in usable().items():
        what = {"what": f"{kind} product"}
        yield (
            what | {"skipped": against}
            if against
            else what | {"tflops": product(sizes, kind) / 1e12}
        )


def randn(*shape):
    """Normal numbers made on the host: CuPy's generator would need another library."""
    numbers = np.random.default_rng(0).standard_normal(1 << 16, np.float32)
    count = int(np.prod(shape))
    tiled = cupy().tile(cupy().asarray(numbers), -(-count // len(numbers)))
    return tiled[:count].reshape(shape)


def row(name: str, f, inputs: list[tuple], sizes: Sizes, moved: float) -> dict:
    """A kernel beside the readable pass; no gain is given where Python limits the latter."""
    fast = seconds(f, inputs, sizes.rounds)
    figures = {"pass": name, "ms": fast * 1e3, "gb_per_second": moved / fast / 1e9}
    try:
        readable = seconds(f.dispatch(object), inputs, max(2, sizes.rounds // 10))
        begin = time.perf_counter()
        f.dispatch(object)(*inputs[0])
        asked = time.perf_counter() - begin
    except MemoryError as error:  # it needs more room than the kernel
        return figures | {"readable_failed": str(error)}
    figures |= {"readable_ms": readable * 1e3, "readable_host_ms": asked * 1e3}
    return figures | ({"gain": readable / fast} if asked < busy_seconds() else {})


def kernels(sizes: Sizes) -> Iterator[dict]:
    for shape in sizes.maps:
        name, nbytes = "x".join(map(str, shape)), 4 * int(np.prod(shape))
        x, g, y = ([randn(*shape) for _ in range(TURNS)] for _ in range(3))
        c = [randn(shape[-1]) ** 2 for _ in range(5)]
        about, count = (*c[:2], 1e-5), x[0].size // shape[-1]
        cases = {
            norm.moments: ([(x[i],) for i in range(TURNS)], 1),
            norm.scale_shift: ([(x[i], *about, *c[2:4], g[i], True) for i in range(TURNS)], 3),
            norm.gradient_sums: ([(g[i], x[i], *about, y[i]) for i in range(TURNS)], 4),
            norm.input_gradient: ([(g[i], x[i], *about, *c[2:], count) for i in range(TURNS)], 3),
        }
        for f, (inputs, passes) in cases.items():
            yield row(f"{f.__name__} {name}", f, inputs, sizes, passes * nbytes)
        few = shape[0] // 8, *shape[1:]  # patches are nine times as large as images
        around = (3, 3), (1, 1), (1, 1), shape[1:3]
        patches = [randn(int(np.prod(few[:3])), 9 * shape[3]) for _ in range(TURNS)]
        window = (3, 3), (2, 2), ((1, 1), (1, 1))
        pooled = [pool.max_pool_output(each, *window) for each in x]
        cases = {
            conv.unfold: ([(x[i][: few[0]], *around) for i in range(TURNS)], "3x3", 10 / 8),
            conv.fold: (
                [(patches[i], g[i][: few[0]], *around) for i in range(TURNS)],
                "3x3",
                10 / 8,
            ),
            pool.max_pool_output: ([(each, *window) for each in x], "3x3/2", 1.3),
            pool.max_pool_input_gradient: ([(*p, shape, *window) for p in pooled], "3x3/2", 1.3),
        }
        for f, (inputs, kernel, passes) in cases.items():
            name = "x".join(map(str, few if kernel == "3x3" else shape))
            yield row(f"{f.__name__} {kernel} {name}", f, inputs, sizes, passes * nbytes)


def losses(sizes: Sizes) -> Iterator[dict]:
    """NT-Xent, forward and backward, and its peak memory besides its input.

    host_ms is what Python needs to ask for it; where that is more than busy_ms, so is ms.
    """
    for views, dim in sizes.losses:
        z = [Tensor(randn(views, dim), requires_grad=True) for _ in range(2)]
        peak = cupy().get_default_memory_pool()
        peak.free_all_blocks()
        before = peak.total_bytes()
        taken = seconds(lambda a, b: loss.nt_xent(a, b, 0.5).backward(), [tuple(z)], sizes.rounds)
        held = peak.total_bytes() - before
        name = f"NT-Xent and its gradient, 2 x {views} x {dim}"
        begin = time.perf_counter()
        loss.nt_xent(*z, 0.5).backward()
        asked = time.perf_counter() - begin
        yield {"pass": name, "ms": taken * 1e3, "host_ms": asked * 1e3,
               "busy_ms": busy_seconds() * 1e3, "mib": held / 2**20}  # fmt: skip


def convolutions(sizes: Sizes) -> Iterator[dict]:
    """Every pass as it is chosen, and as `ops` does it: by patches.

    The flops are those of the plain algorithm; Winograd's method needs a quarter of them.
    """
    for (x, w, s), kind in product_of(sizes.convs, kinds()):
        with precision(kind, "cuda:0"):
            for which, (f, given) in passes_of(x, w, s).items():
                taken = seconds(f, [given], sizes.rounds)
                patches = seconds(f.dispatch(object), [given], max(2, sizes.rounds // 4))
                flops = 2 * x[0] * int(np.prod(output_size(x, w, *given[-2:]))) * int(np.prod(w))
                yield {"pass": f"{which} {named(x, w, s)}", "precision": kind, "ms": taken * 1e3,
                       "by_patches_ms": patches * 1e3, "tflops": flops / taken / 1e12}  # fmt: skip


def kinds() -> list[str]:
    return [kind for kind, against in usable().items() if not against]


def named(x: tuple, w: tuple, s: int) -> str:
    return f"{'x'.join(map(str, x))} * {'x'.join(map(str, w))}/{s}"


def passes_of(x: tuple, w: tuple, s: int) -> dict[str, tuple]:
    """The three passes of a convolution and what each is given, in the precision in force."""
    at = (s, s), (w[0] // 2, w[1] // 2)
    gy = (x[0], *output_size(x, w, *at), w[3])
    a, b = (y.astype(activations.get() or y.dtype) for y in (randn(*x), randn(*gy)))
    return {
        "output": (conv.conv_output, (a, randn(*w), *at)),
        "input": (conv.conv_input_gradient, (b, randn(*w), x, *at)),
        "weight": (conv.conv_weight_gradient, (b, a, w, *at)),
    }


def torch_convolutions(sizes: Sizes) -> Iterator[dict]:
    """The same passes by PyTorch and cuDNN, in both layouts."""
    for (x, w, s), kind in product_of(sizes.convs, kinds()):
        for layout in ("channels_last", "contiguous_format"):
            for which, run in torch_passes(x, w, s, kind, layout).items():
                taken = torch_seconds(run, max(2, sizes.rounds // 2))
                yield {"pass": f"{which} {named(x, w, s)}", "precision": kind, "layout": layout,
                       "ms": taken * 1e3}  # fmt: skip


def torch_passes(
    x: tuple, w: tuple, s: int, kind: str, layout: str, device: str = "cuda"
) -> dict[str, Callable]:
    """cuDNN tries its algorithms whenever it meets new shapes."""
    import torch

    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = kind == "tf32"
    form = {"dtype": torch.bfloat16 if kind == "bf16" else torch.float32, "device": device}
    (n, height, width, c), (kh, kw, _, o) = x, w
    images, weight = (
        torch.randn(shape, **form).contiguous(memory_format=getattr(torch, layout))
        for shape in ((n, c, height, width), (o, c, kh, kw))
    )
    at = [s, s], [kh // 2, kw // 2], [1, 1], False, [0, 0], 1
    output = lambda: torch.convolution(images, weight, None, *at)  # noqa: E731
    gy = torch.randn_like(output())  # in the same layout
    gradient = torch.ops.aten.convolution_backward
    return {
        "output": output,
        "input": lambda: gradient(gy, images, weight, None, *at, [True, False, False])[0],
        "weight": lambda: gradient(gy, images, weight, None, *at, [False, True, False])[1],
    }


def torch_seconds(run: Callable, rounds: int) -> float:
    """`seconds` on PyTorch's stream."""
    import torch

    much, times = torch.randn(FF, BUSY, BUSY, device="cuda"), []
    for _ in range(rounds + 2):  # the first two are to warm up
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        much @ much  # as long as keep_busy
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times[2:])


def blocks(sizes: Sizes) -> Iterator[dict]:
    """Convolutions in blocks of other sizes: do those pay that stay in the GPU's cache?

    All three passes together, in the last of the precisions; host_ms is what Python needs to ask
    for them.
    """
    kind, chosen = kinds()[-1], conv.GPU_WORKSPACE
    for (x, w, s), shift in product_of(sizes.convs, (-5, -4, -3, -2, -1, 0, 1)):
        if w[:2] == (1, 1):  # has no patches
            continue
        conv.GPU_WORKSPACE = int(chosen * 2.0**shift)
        try:
            with precision(kind, "cuda:0"):
                given = passes_of(x, w, s).values()

                def run(given=given) -> None:
                    for f, each in given:
                        f(*each)

                taken = seconds(run, [()], max(2, sizes.rounds // 2))
                begin = time.perf_counter()
                run()
                asked = time.perf_counter() - begin
        finally:
            conv.GPU_WORKSPACE = chosen
        yield {"blocks": named(x, w, s), "precision": kind, "numbers": int(chosen * 2.0**shift),
               "ms": taken * 1e3, "host_ms": asked * 1e3}  # fmt: skip


def views(sizes: Sizes) -> Iterator[dict]:
    """Views a second from uint8 on the GPU; torchvision's, image by image, if it is there."""
    xp = cupy()
    for n, side, size in sizes.views:
        images = np.random.default_rng(0).integers(0, 256, (n, side, side, 3), np.uint8)
        given = [
            (xp.asarray(images), augment.draw_views(0, i, n, side, side), size)
            for i in range(TURNS)
        ]
        moved = 2 * n * (size * size * 12 + side * side * 3)  # each view reads its picture
        name = f"two views of {n} images, {side} to {size} px"
        fast = row(name, augment.apply_views, given, sizes, moved)
        begin = time.perf_counter()
        for i in range(sizes.rounds):  # with the draws and the host's time, as torchvision below
            augment.two_views(given[i % TURNS][0], 0, i, size)
        xp.cuda.get_current_stream().synchronize()
        taken = time.perf_counter() - begin
        fast |= {"views_per_second": 2 * n * sizes.rounds / taken}
        yield fast
        yield torchvision_views(images, size)


def torchvision_views(images: np.ndarray, size: int) -> dict:
    try:
        import torch
        from torchvision.transforms import v2
    except ImportError as error:
        return {"pass": "torchvision", "skipped": str(error)}
    chain = v2.Compose([
        v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(size // 10 // 2 * 2 + 1)], 0.5 if size > 32 else 0),
    ])  # fmt: skip
    count = 64
    stored = torch.tensor(images[:count], device="cuda").permute(0, 3, 1, 2)
    for _ in range(2):  # the first time is to warm up
        torch.cuda.synchronize()
        start = time.perf_counter()
        for image in stored:
            chain(image), chain(image)
        torch.cuda.synchronize()
        taken = time.perf_counter() - start
    return {"pass": f"torchvision to {size} px", "views_per_second": 2 * len(stored) / taken}


def lars(sizes: Sizes) -> Iterator[dict]:
    """One LARS step on the parameters of an encoder: ours, the readable one, torch._foreach.

    On the device; the time that the host needs to launch it is part of the whole steps.
    """
    net = ENCODERS[sizes.encoder](width=sizes.width).to("cuda:0")
    optimizer = optim.LARS(net.named_parameters(), 0.01)
    for p in optimizer.parameters.values():
        p.grad = randn(*p.shape)
    moved = 7 * sum(p.data.nbytes for p in optimizer.parameters.values())
    first = next(iter(optimizer.parameters.values())).data
    given = [(first, optimizer, True)]
    name = f"LARS, {len(optimizer.parameters)} parameters"
    yield row(name, optim.update_all, given, sizes, moved)
    try:
        import torch
    except ImportError as error:
        yield {"pass": "torch._foreach LARS", "skipped": str(error)}
        return
    w = [torch.randn(p.shape, device="cuda") for p in optimizer.parameters.values()]
    g, v = [torch.randn_like(a) for a in w], [torch.zeros_like(a) for a in w]

    def foreach() -> None:
        d = torch._foreach_add(g, w, alpha=1e-6)
        ratio = torch._foreach_div(torch._foreach_norm(w), torch._foreach_norm(d))
        torch._foreach_mul_(d, torch._foreach_mul(ratio, 0.001 * 0.01))
        torch._foreach_mul_(v, 0.9)
        torch._foreach_add_(v, d)
        torch._foreach_sub_(w, v)

    # Even there, scaling by a list of numbers on the device is a launch for each parameter.
    name = "torch._foreach LARS, with a launch for each parameter"
    yield {"pass": name, "ms": torch_seconds(foreach, sizes.rounds) * 1e3}


def shares(sizes: Sizes) -> Iterator[dict]:
    """Whole steps beside the least total time that the GPU's ceilings allow their operations.

    Winograd's method needs fewer flops than are counted, so in float32 it may beat that time. With
    TF32 its products stay float32, and no kernel can bring them to the ceiling of the others.
    """
    band = profile.roofline("cuda:0", sizes.matrix, sizes.vector)["bytes_per_second"]
    for kind in kinds():
        flops = product(sizes, kind)
        for encoder, width, size, n in sizes.steps:
            row = {"step": f"{encoder}, {n} images of {size} px", "precision": kind}
            try:
                with precision(kind, "cuda:0"):
                    found = profile.profile(encoder, "auto", width, size, n, device="cuda:0")
            except MemoryError as error:  # others may fit
                yield row | {"failed": f"{type(error).__name__}: {error}"}
                continue
            least = sum(max(e["flops"] / flops, e["bytes"] / band) for e in found["events"])
            row |= {"ms": found["step_seconds"] * 1e3, "roofline_ms": least * 1e3}
            yield row | {"share": least / found["step_seconds"]}


def steps(sizes: Sizes) -> list[dict]:
    """Whole training steps beside PyTorch's, each in its own process."""
    rows = sizes.out.with_suffix(".steps.json")  # survives if this process is killed
    command = [sys.executable, str(HERE / "compare_torch.py"), "--device", "cuda"]
    try:
        run = subprocess.run(
            [*command, "--json", str(rows)], capture_output=True, text=True, timeout=sizes.left()
        )
        return json.loads(rows.read_text()) if rows.exists() else [{"failed": run.stderr[-500:]}]
    except subprocess.TimeoutExpired as error:
        done = json.loads(rows.read_text()) if rows.exists() else []
        return [*done, {"skipped": f"the rest: no time left after {error.timeout:.0f} s"}]
    finally:
        rows.unlink(missing_ok=True)


def table(results: dict[str, list[dict]]) -> str:
    lines = []
    for part, rows in results.items():
        lines.append(part)
        for each in rows:
            shown = (
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in each.items()
            )
            lines.append("  " + ", ".join(shown))
    return "\n".join(lines)


PARTS = (
    *(facts, tests, ceilings, kernels, losses, convolutions, views, lars, shares, steps),
    *(torch_convolutions, blocks),  # if steps leave time: these tell what to do next
)


def rows_of(name: str, sizes: Sizes) -> Iterator[list[dict]]:
    """The rows of a part so far, made in this process; yields after each row."""
    rows: list[dict] = []
    begin = time.monotonic()
    (part,) = (part for part in PARTS if part.__name__ == name)
    try:
        if part not in (facts, tests, steps):  # they measure nothing in this process
            busy(BUSY)  # before any part counts bytes
        for each in part(sizes):
            rows.append(each)
            yield rows
    except Exception as error:  # it must not cost the earlier rows
        rows.append({"failed": f"{type(error).__name__}: {error}"})
    rows.append({"seconds_taken": time.monotonic() - begin})
    with suppress(Exception):  # after some errors a GPU no longer answers
        rows[-1]["pool_bytes"] = peak_memory("cuda:0")
    yield rows


def apart(name: str, a: argparse.Namespace, left: float) -> list[dict]:
    """The rows of a part, made in its own process: so neither a GPU error, from which a process
    cannot recover, nor a kernel that never ends costs another part.
    """
    out, said = a.out.with_suffix(f".{name}.json"), ""
    left = left if name == "steps" else min(left, LONG)
    command = [sys.executable, __file__, "--here", "--part", name, "--out", str(out)]
    command += ["--minutes", str(left / 60), *["--small"] * a.small]
    try:
        run = subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=left + SLACK
        )
        if run.returncode:
            told = run.stderr.decode(errors="replace")[-500:]
            said = f"its process ended with {run.returncode}: {told}"
    except subprocess.TimeoutExpired as error:
        said = f"no end after {error.timeout:.0f} s"
    rows = json.loads(out.read_text())[name] if out.exists() else []
    out.unlink(missing_ok=True)
    return [*rows, *[{"failed": said}] * bool(said)]


def main(arguments: list[str] | None = None) -> dict[str, list[dict]]:
    names = [part.__name__ for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script out")
    parser.add_argument("--part", choices=names, nargs="*", default=names)
    parser.add_argument("--here", action="store_true", help="all parts in this process")
    a = parser.parse_args(arguments)
    global BUSY
    BUSY = 64 if a.small else BUSY
    sizes, end = Sizes(a.small), time.monotonic() + 60 * a.minutes
    sizes.out, sizes.left = a.out, lambda: max(1.0, end - time.monotonic())
    results: dict[str, list[dict]] = {}

    def keep(name: str, rows: list[dict]) -> None:
        results[name] = rows
        write_bytes(a.out, json.dumps(results, indent=1).encode())

    if not a.here:
        about = apart("facts", a, sizes.left())
        if failed := about[0].get("failed"):  # PyTorch's steps need no CuPy
            a.part = [name for name in a.part if name == "steps"]
            if not a.part:
                sys.exit(f"error: {failed}")
        about[0]["command"] = " ".join(sys.argv)
        keep("facts", about)
        print(table(results), flush=True)
    for name in a.part:
        if time.monotonic() >= end:
            keep(name, [{"skipped": "no time left"}])
        elif a.here:
            for rows in rows_of(name, sizes):
                keep(name, rows)
        elif name != "facts":
            keep(name, apart(name, a, sizes.left()))
            print(table({name: results[name]}), flush=True)
    return results


if __name__ == "__main__":
    main()
