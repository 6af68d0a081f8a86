"""Is this installation sound, and what can the machine do? Facts, then seconds of self-test."""

import os
import platform
import shutil
import time
from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import augment, profile
from .backend import NO_GPU, choose_device, cuda_driver, to_device, try_gpu
from .cores import available_cores, blas_kernels, sets_blas_threads, threads
from .data import cache_folder, toydogs
from .errors import ConfigError
from .ops.loss import nt_xent
from .optim import SGD
from .simclr import Model, chance_loss, training_step
from .tensor import Tensor, gradcheck

NEEDED = "numpy", "pillow", "h5py", "click"
OPTIONAL = "matplotlib", "cupy-cuda12x", "cupy-cuda13x", "ml_dtypes"
STEPS = 25


class Check(NamedTuple):
    """One line of the doctor's sheet; not ok means that something does not work."""

    name: str
    ok: bool
    found: str


def examine() -> list[Check]:
    """All checks, in the order in which to read them; takes some seconds."""
    checks = []
    for check in (versions, optional, blas, device, gpu, disk, speed, gradients, learning):
        try:
            ok, found = check()
        except Exception as error:  # whatever is broken, the doctor must report it
            ok, found = False, f"{type(error).__name__}: {error}"
        checks.append(Check(check.__name__, ok, found))
    return checks


def installed(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"{name} is not installed"


def versions() -> tuple[bool, str]:
    found = ", ".join(installed(name) for name in ("minisimclr", *NEEDED))
    said = f"Python {platform.python_version()}, {found}; this is {Path(__file__).parent}"
    return "not installed" not in found, said


def optional() -> tuple[bool, str]:
    return True, ", ".join(installed(name) for name in OPTIONAL)


def blas() -> tuple[bool, str]:
    found: Any = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    kernels = f", products for {blas_kernels()}" if blas_kernels() else ""
    used = threads() if sets_blas_threads() else "as many as it likes, --threads does not reach it"
    name = " ".join(found[k] for k in ("name", "version") if k in found) or "none"
    return True, f"{name}{kernels}, threads: {used}"


def device() -> tuple[bool, str]:
    name, reason = choose_device("auto")
    return True, f"{name} ({reason}), cores: {available_cores()}, {platform.machine()}"


def gpu() -> tuple[bool, str]:
    """Try a kernel, a product and eigenvalues on it; no fault without a driver, CuPy or a GPU."""
    if not cuda_driver():
        return True, "none: there is no NVIDIA driver"
    try:
        return True, f"a kernel, a matrix product and eigenvalues ran on {try_gpu(0)}"
    except ConfigError as error:
        return "not installed" in str(error) or NO_GPU in str(error), str(error)


def disk() -> tuple[bool, str]:
    folder = cache_folder()
    there = next((p for p in (folder, *folder.parents) if p.exists()), folder)
    free, files = shutil.disk_usage(there).free, sorted(folder.glob("*.h5"))
    used = sum(path.stat().st_size for path in files)
    said = f"{folder}: data sets: {len(files)}, {used / 1e6:,.0f} MB; {free / 1e9:,.1f} GB free"
    if not (there.is_dir() and os.access(there, os.W_OK)):
        return False, f"{said}: {there} cannot be written: name another in XDG_CACHE_HOME"
    return free > 1e9, said if free > 1e9 else f"{said}: less than a data set may need"


def speed() -> tuple[bool, str]:
    flops, band = profile.roofline(choose_device("auto")[0], 1024, 1 << 23).values()
    return True, f"{flops / 1e9:,.0f} GFLOP/s in matrix products, {band / 1e9:,.1f} GB/s in sums"


def gradients() -> tuple[bool, str]:
    """Those of pictures and of all weights, through encoder, head and loss: in float64 against
    finite differences, and in float32, for which there are faster passes, against float64.
    """
    model = Model.build("resnet_small", "small", 2, seed=0, d_out=4).astype(np.float64)
    rng = np.random.default_rng(0)
    # Moved a little: a gamma that begins with 0, for one, may put ReLU at its kink.
    weights = {n: p.data + 0.1 * rng.standard_normal(p.shape) for n, p in model.named_parameters()}

    def loss(x: Tensor, *given: Tensor) -> Tensor:
        for name, weight in zip(weights, given, strict=True):
            path, _, attribute = name.rpartition(".")
            vars(attrgetter(path)(model))[attribute] = weight  # a Module wants a Parameter
        z = model.head(model.encoder(x))  # (6, 4)
        return nt_xent(z[:3], z[3:])

    gradcheck(loss, rng.random((6, 8, 8, 3)), *weights.values(), rtol=1e-5)
    trained, exact = slopes(np.float32), slopes(np.float64)
    least = 1e-5 * max(map(np.linalg.norm, exact.values()))  # batch norm may undo a parameter
    for name, g in exact.items():
        far = np.linalg.norm(trained[name] - g) / max(np.linalg.norm(g), least)
        if not far < 1e-2:  # `assert` would do nothing under python -O
            raise AssertionError(f"{name}: the gradient in float32 is {far:.1%} off float64's")
    return True, "backward agrees with finite differences, float32 with float64"


def slopes(kind: Any) -> dict[str, Any]:
    """Gradients of a network with every kind of layer, by the names of its parameters."""
    model = Model.build("resnet18", "imagenet", 8, seed=0).astype(kind)
    x = np.random.default_rng(0).random((8, 32, 32, 3)).astype(kind)
    z = model.head(model.encoder(Tensor(x)))  # (8, 128)
    nt_xent(z[:4], z[4:]).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def learning() -> tuple[bool, str]:
    """A few steps of training on pictures drawn here."""
    images = np.stack([toydogs.draw(i, 20) for i in range(64)])  # (N, 20, 20, 3)
    where, _ = choose_device("auto")
    model = Model.build("resnet_small", "small", 16, seed=0).to(where)
    optimizer, batch = SGD(model.named_parameters(), 0.1), to_device(images, where)
    losses, start = [], time.perf_counter()
    for step in range(STEPS):
        views = augment.draw_views(0, step, len(images), 20, 20)
        losses.append(training_step(model, optimizer, batch, views, 16, 0.5).figures["loss"])
    rate = STEPS * 2 * len(images) / (time.perf_counter() - start)
    first, last, chance = np.mean(losses[:5]), np.mean(losses[-5:]), chance_loss(len(images))
    said = f"loss {first:.2f} to {last:.2f} in {STEPS} steps (chance {chance:.2f}), "
    return bool(last < first - 0.1), f"{said}{rate:,.0f} views/s"
