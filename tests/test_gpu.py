"""The same on a GPU, where there is one: pytest -m gpu.

Tests of the stand-in (test_device.py) and of the kernels on the CPU (test_cuda.py), taken over with
another fixture: the real CuPy, which tells of every wait by a private function of its own.
"""

import gc
import re
import sys
import traceback
from contextlib import nullcontext

import fake_cupy
import numpy as np
import pytest
from test_cuda import (  # noqa: F401
    test_a_batch_may_be_empty_here_too,
    test_a_file_does_what_the_readable_passes_do,
    test_a_gradient_may_be_written_over,
    test_a_residual_in_another_precision_than_bfloat16_is_converted,
    test_a_training_step_in_bfloat16,
    test_a_training_step_waits_for_nothing,
    test_a_weight_without_a_gradient_has_no_trust_ratio,
    test_activations_in_bfloat16_take_half_the_memory,
    test_bfloat16_costs_two_digits,
    test_every_number_is_rounded_as_numpys_bfloat16_is,
    test_grey_pixels_have_no_hue,
    test_images_are_tiled_a_few_at_a_time,
    test_images_at_odd_addresses_are_copied_number_by_number,
    test_in_bfloat16_a_network_is_as_exact_as_in_torchs_autocast,
    test_large_views_are_blurred_and_small_ones_are_not,
    test_nothing_moves_where_a_number_is_not_finite,
    test_products_in_bfloat16_take_parts_of_matrices_and_float32,
    test_relu_keeps_what_is_not_a_number,
    test_tiles_take_no_more_memory_than_they_may,
    test_what_is_not_a_number_or_infinite_stays_so,
    test_winograds_tiles_round_a_little_more_than_plain_sums,
)
from test_device import (  # noqa: F401
    config,
    randn,
    test_a_run_of_the_device_is_probed,
    test_an_operation_and_its_gradients,
    test_divergence_on_the_device,
    test_networks,
    test_optimizers,
    test_stopped_and_resumed_on_the_device,
    test_the_loop_reads_a_step_while_the_next_one_runs,
    test_the_probe_and_its_metrics,
    test_views,
)
from test_kernels import distance, same_numbers_in_any_order  # noqa: F401

from minisimclr import backend, doctor
from minisimclr.errors import ConfigError
from minisimclr.ops.conv import conv_output

pytestmark = pytest.mark.gpu


class Real:
    """CuPy, with a counter of what makes the host wait."""

    def __init__(self, cupy):
        self.cupy, self.counter = cupy, fake_cupy.Counter()

    def note(self):
        """What CuPy calls before it waits; also, wrongly, before a copy that nobody waits for."""
        unasked = {"later", "host"}  # such copies, and those of the tests themselves
        # This reads no source, and so is quick.
        frames = [frame.f_code for frame, _ in traceback.walk_stack(sys._getframe())]
        if unasked.isdisjoint(code.co_name for code in frames):
            self.counter.syncs.append(" < ".join(code.co_qualname for code in frames[1:5]))

    def __getattr__(self, name):
        return getattr(self.cupy, name)


@pytest.fixture
def cupy(monkeypatch):
    try:
        backend.try_gpu(0)
    except ConfigError as error:
        pytest.skip(str(error))
    real = Real(backend.cupy())
    monkeypatch.setattr(real.cupy._core.syncdetect, "_declare_synchronize", real.note)
    return real


@pytest.fixture(autouse=True)
def precisions(request, cupy):
    """Cards before Ampere have neither bfloat16 nor TF32."""
    if {"bfloat16", "precision"} & set(re.split(r"[_\W]", request.node.name)):
        try:
            with backend.precision("bf16", "cuda:0"):
                pass
        except ConfigError as error:
            pytest.skip(str(error))


def test_figures_arrive_from_pinned_memory(cupy):
    reads = [backend.later(cupy.arange(3.0) + i) for i in range(100)]
    assert [read()[0] for read in reads] == list(range(100))


@pytest.mark.parametrize("kind, least, most", [("tf32", 1e-5, 1e-3), ("bf16", 1e-3, 1e-2)])
def test_a_precision_rounds_as_much_as_it_should(cupy, kind, least, most):
    for side in (3, 5):
        x, w, padding = randn(4, 16, 16, 64), randn(side, side, 64, 64), (side // 2, side // 2)
        exact = conv_output(x.astype(np.float64), w.astype(np.float64), (1, 1), padding)
        on_device = cupy.asarray(x), cupy.asarray(w), (1, 1), padding
        assert distance(conv_output(*on_device).get(), exact) < 2e-6
        with backend.precision(kind, "cuda:0"):
            images = on_device[0].astype(backend.activations.get() or np.float32)
            error = distance(conv_output(images, *on_device[1:]).get(), exact)
        exempt = kind == "tf32" and side == 3  # Winograd's products stay float32
        assert error < 2e-6 if exempt else least < error < most


def test_copies_arrive_in_order_and_whole(cupy):
    batches = [np.full((64, 64, 64, 3), i, np.uint8) for i in range(50)]
    sums = [cupy.stack([x.min(), x.max()]) for x in backend.uploaded(batches, "cuda:0")]
    assert cupy.stack(sums).get().tolist() == [[i, i] for i in range(50)]


def test_pieces_of_a_first_step_fit_together(cupy):
    pool = cupy.get_default_memory_pool()

    def held(first):
        gc.collect()  # what other tests have left, or it would go in between
        pool.free_all_blocks()
        before = pool.total_bytes()
        with first:
            step()
        for _ in range(3):
            step()
        return round((pool.total_bytes() - before) / 2**20)

    def step():
        for count, size in ((3, 8), (2, 12)):
            arrays = [cupy.empty(size << 20, np.uint8) for _ in range(count)]
            del arrays

    assert held(nullcontext()) == 3 * 8 + 2 * 12
    assert held(backend.sized_by_first("cuda:0")) == 24


def test_the_doctor_finds_it_sound(cupy):
    assert doctor.gpu()[0]
    assert backend.choose_device("auto")[0] == "cuda:0"
