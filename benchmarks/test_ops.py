"""Every pass, in its readable and its NumPy version, and one whole training step.

    pytest benchmarks/test_ops.py [-k conv] [--benchmark-compare=benchmarks/baseline.json]

Shapes are those of ResNets on 32-px and 96-px views. `extra_info` has the floating-point operations
and the fewest bytes that the mathematics needs, so that any time can be turned into a rate.
Results are compared before they are timed: a fast wrong answer is worth nothing.
"""

from functools import partial

import numpy as np
import pytest

from minisimclr.ops.conv import (
    conv_gradients,
    conv_input_gradient,
    conv_output,
    conv_weight_gradient,
    output_size,
)
from minisimclr.ops.loss import nt_xent
from minisimclr.ops.norm import gradient_sums, input_gradient, moments, scale_shift
from minisimclr.ops.pool import max_pool_input_gradient, max_pool_output
from minisimclr.optim import SGD, momentum_update
from minisimclr.simclr import Model
from minisimclr.tensor import Tensor, added

rng = np.random.default_rng(0)


def randn(*shape):
    return rng.standard_normal(shape, np.float32)


# x (N, H, W, C), w (KH, KW, C, O), stride
CONVOLUTIONS = {
    "3x3-32px-64": ((64, 32, 32, 64), (3, 3, 64, 64), 1),
    "3x3-16px-32": ((256, 16, 16, 32), (3, 3, 32, 32), 1),
    "3x3-16px-128": ((64, 16, 16, 128), (3, 3, 128, 128), 1),
    "3x3-8px-256": ((64, 8, 8, 256), (3, 3, 256, 256), 1),
    "3x3-6px-256": ((32, 6, 6, 256), (3, 3, 256, 256), 1),
    "3x3-4px-512": ((64, 4, 4, 512), (3, 3, 512, 512), 1),
    "3x3-stride2-64": ((64, 32, 32, 64), (3, 3, 64, 128), 2),
    "1x1-24px-64": ((32, 24, 24, 64), (1, 1, 64, 256), 1),
    "1x1-stride2-256": ((32, 24, 24, 256), (1, 1, 256, 512), 2),
    "stem-3x3": ((128, 32, 32, 3), (3, 3, 3, 64), 1),
    "stem-7x7": ((32, 96, 96, 3), (7, 7, 3, 64), 2),
}
MAPS = {"32px-64": (64, 32, 32, 64), "24px-256": (32, 24, 24, 256), "4px-512": (128, 4, 4, 512)}
POOL = (3, 3), (2, 2), ((1, 1), (1, 1))


def convolution(name, which):
    x, w, s = CONVOLUTIONS[name]
    stride, padding = (s, s), (w[0] // 2, w[1] // 2)
    size = output_size(x, w, stride, padding)
    gy = (x[0], *size, w[3])
    flops = 2 * np.prod(gy) * np.prod(w[:3])
    args = {
        "output": lambda: (randn(*x), randn(*w), stride, padding),
        "input": lambda: (randn(*gy), randn(*w), x, stride, padding),
        "weight": lambda: (randn(*gy), randn(*x), w, stride, padding),
        "both": lambda: (randn(*gy), randn(*x), randn(*w), stride, padding),
    }[which]()
    return args, 2 * flops if which == "both" else flops


def vectors(name, count):
    return [randn(MAPS[name][-1]) for _ in range(count)]


def statistics(name):
    """Mean, variance and eps."""
    mean, variance = vectors(name, 2)
    return mean, variance**2, 1e-5


def relu_like(name):
    return np.maximum(randn(*MAPS[name]), 0)


def pool(backward):
    x = randn(64, 32, 32, 64)
    y, argmax = max_pool_output.dispatch(object)(x, *POOL)
    args = (randn(*y.shape), argmax, x.shape, *POOL) if backward else (x, *POOL)
    return args, 9 * y.size


def convolutions(which, stems=True):
    names = [name for name in CONVOLUTIONS if stems or not name.startswith("stem")]
    return {name: partial(convolution, name, which) for name in names}


def on_maps(operations, arguments):
    """Cases with arguments(name, shape) and so many operations for each number of the map."""

    def make(name, shape):
        return arguments(name, shape), operations * np.prod(shape)

    return {name: partial(make, name, shape) for name, shape in MAPS.items()}


def filters():
    return (*(randn(3, 3, 512, 512) for _ in range(3)), 0.1, 0.9, 1e-4), 6 * 9 * 512 * 512


# the pass: {case: a function that makes (arguments, floating-point operations)}
PASSES = {
    conv_output: convolutions("output"),
    conv_input_gradient: convolutions("input", stems=False),
    conv_weight_gradient: convolutions("weight"),
    conv_gradients: convolutions("both", stems=False),
    moments: on_maps(3, lambda name, s: (randn(*s),)),
    scale_shift: on_maps(
        4, lambda name, s: (randn(*s), *statistics(name), *vectors(name, 2), randn(*s), True)
    ),
    gradient_sums: on_maps(
        5, lambda name, s: (randn(*s), randn(*s), *statistics(name), relu_like(name))
    ),
    input_gradient: on_maps(
        5,
        lambda name, s: (
            randn(*s),
            randn(*s),
            *statistics(name),
            *vectors(name, 3),
            np.prod(s[:-1]),
        ),
    ),
    added: on_maps(1, lambda name, s: (randn(*s), randn(*s))),
    max_pool_output: {"3x3": partial(pool, backward=False)},
    max_pool_input_gradient: {"3x3": partial(pool, backward=True)},
    momentum_update: {"3x3x512x512": filters},
}
CASES = {f.__name__: (f, cases) for f, cases in PASSES.items()}


@pytest.mark.parametrize("version", ["reference", "fast"])
@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, (_, cases) in CASES.items() for case in cases]
)
def test_pass(benchmark, name, case, version):
    f, cases = CASES[name]
    args, flops = cases[case]()
    reference, run = f.dispatch(object), f.dispatch(np.ndarray if version == "fast" else object)
    arrays = [a for a in args if isinstance(a, np.ndarray)]
    copies = [a.copy() if isinstance(a, np.ndarray) else a for a in args]
    made = reference(*copies), run(*args)
    if f is momentum_update:  # in place
        made = (copies[0], copies[2]), (args[0], args[2])
    pairs = zip(*(m if isinstance(m, tuple) else (m,) for m in made), strict=True)
    for theirs, ours in pairs:
        arrays.append(ours)
        assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs)
    benchmark.group = f"{name} {case}"
    benchmark.extra_info |= {"flops": int(flops), "bytes": sum(a.nbytes for a in arrays)}
    benchmark.pedantic(run, args, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("encoder", ["resnet_small", "resnet18"])
def test_training_step(benchmark, encoder):
    stem, n = ("small", 128) if encoder == "resnet_small" else ("cifar", 64)
    model = Model.build(encoder, stem, 0, seed=0)
    optimizer = SGD(model.named_parameters(), 0.1, weight_decay=1e-4)
    views = rng.random((2 * n, 32, 32, 3), np.float32)

    def step():
        optimizer.zero_grad()
        z = model.head(model.encoder(Tensor(views)))
        nt_xent(z[:n], z[n:]).backward()
        optimizer.step()

    benchmark.group = "training step"
    benchmark.extra_info |= {"views": 2 * n}
    benchmark.pedantic(step, rounds=5, warmup_rounds=2)
