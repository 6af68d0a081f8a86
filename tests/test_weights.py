"""Importing weights: every format against the library that writes it, names, shapes, export."""

import json
import re
import textwrap
from pathlib import Path
from unittest.mock import Mock

import h5py
import numpy as np
import pytest

import minisimclr as ms
from minisimclr import checkpoint, nn, weights
from minisimclr.augment import center_view
from minisimclr.errors import ConfigError, DataError
from minisimclr.run import make_run_folder, new_run
from minisimclr.tensor import Tensor, no_grad
from minisimclr.weights import names, safetensors
from minisimclr.weights.stored import Spec, Stored
from minisimclr.weights.tf_bundle import masked_crc32c

SIMCLR = Path(__file__).parent / "fixtures" / "simclr-r50.ckpt"  # written by TensorFlow


def random_state(net, seed=0):
    """A state dict with statistics that are not the initial ones."""
    rng = np.random.default_rng(seed)
    state = {
        name: rng.uniform(0.5, 1.5, array.shape).astype("f4")
        for name, array in net.state_dict().items()
    }
    return state | {n: np.array(7) for n in state if n.endswith("num_batches_tracked")}


def assert_state(net, state, names=None):
    after = net.state_dict()
    for name in names or state:
        np.testing.assert_array_equal(after[name], state[name], err_msg=name)


def write_keras(path, state, norms=("gamma", "beta", "moving_mean", "moving_variance")):
    """A state dict of InceptionV3 as Keras 2 writes it: numbered from 1, layers in any order; and
    after a network of separable convolutions, whose norms count on.
    """
    convolutions = [n for n, a in state.items() if a.ndim == 4]
    layers = [(f"conv2d_{i}", {"kernel:0": state[n].transpose(2, 3, 1, 0)})
              for i, n in enumerate(convolutions, 1)]  # fmt: skip
    ours = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean",
            "moving_variance": "running_var"}  # fmt: skip
    for i, n in enumerate(convolutions, 1):
        bn = n.removesuffix("conv.weight") + "bn."
        arrays = {f"{key}:0": state[bn + ours[key]] for key in norms}
        layers.append((f"batch_normalization_{i + 27}", arrays))
    with h5py.File(path, "w") as f:
        for layer, arrays in sorted(layers):
            for name, array in arrays.items():
                f[f"{layer}/{layer}/{name}"] = array


def test_tensorflow_checkpoint_gives_tensorflow_s_features():
    stored = weights.read(SIMCLR)
    encoder, preprocessing = weights.encoder(SIMCLR)
    assert (encoder.stem, preprocessing) == ("simclr", weights.Preprocessing(224, "unit"))
    head = nn.ProjectionHead(32, 32, 8, layers=3)
    weights.load(head, SIMCLR)
    encoder.eval(), head.eval()
    with no_grad():
        h = encoder(Tensor(stored.fetch("made_by_tensorflow/images")))
        z = head(h)
    for ours, name in ((h, "h"), (z, "z")):
        theirs = stored.fetch(f"made_by_tensorflow/{name}")
        assert np.abs(ours.data - theirs).max() < 1e-5 * np.abs(theirs).max()
    # Numbers, not text, order the layers; a shortcut comes before its block.
    state = encoder.state_dict()
    for ours, theirs in {
        "conv1.weight": "conv2d",
        "layer1.0.downsample.0.weight": "conv2d_1",
        "layer1.0.conv1.weight": "conv2d_2",
        "layer1.2.conv3.weight": "conv2d_10",
        "layer4.2.conv3.weight": "conv2d_52",
    }.items():
        kernel = stored.fetch(f"base_model/{theirs}/kernel")  # HWIO
        np.testing.assert_array_equal(state[ours], kernel.transpose(3, 2, 0, 1))


def numbered(name, i):
    return f"base_model/{name}_{i}" if i else f"base_model/{name}"


def test_the_real_index_is_listed_exactly(test_data):
    """Its 191 variables: each block of the authors' ResNet-18 is [shortcut], 3 x 3, 3 x 3."""
    kernels = [(3, 3, 3, 64)]
    for c, o in ((64, 64), (64, 128), (128, 256), (256, 512)):
        kernels += [(1, 1, c, o), (3, 3, c, o), *[(3, 3, o, o)] * 3]
    shapes = {}
    for i, kernel in enumerate(kernels):
        shapes[numbered("conv2d", i) + "/kernel"] = kernel
        for part in ("gamma", "beta", "moving_mean", "moving_variance"):
            shapes[numbered("batch_normalization", i) + f"/{part}"] = kernel[-1:]
    for i, o in enumerate((512, 512, 128)):
        shapes[f"head_contrastive/nl_{i}/dense/kernel"] = (512, o)
        for part in ("gamma", "beta", "moving_mean", "moving_variance"):
            shapes[f"head_contrastive/nl_{i}/batch_normalization/{part}"] = (o,)
    del shapes["head_contrastive/nl_2/batch_normalization/beta"]
    trained = [name for name in shapes if "moving" not in name]
    shapes |= {f"{name}/Momentum": shapes[name] for name in trained}
    stored = weights.read(test_data / "weights" / "simclr_resnet18_cifar10.ckpt.index")
    expected = {name: (shape, "float32") for name, shape in shapes.items()}
    assert stored.specs == expected | {"global_step": ((), "int64")}
    assert len(stored.specs) == 191
    with pytest.raises(DataError, match="cannot be read"):  # there is no data file
        weights.load(nn.ProjectionHead(512, 512, 128, layers=3), stored)


@pytest.mark.parametrize("stem", ["simclr", "imagenet"])
def test_simclr_resnet50_equals_torch(stem):
    torch = pytest.importorskip("torch")
    from test_nn import torch_resnet

    reference = torch_resnet("resnet50", "imagenet", 8).double().eval()
    fresh = nn.resnet50("simclr", 8)
    convolutions = {n: a for n, a in fresh.state_dict().items() if a.ndim == 4}
    state = random_state(fresh) | convolutions
    reference.load_state_dict({n: torch.tensor(a) for n, a in state.items()})
    pad = {"simclr": (0, 1, 1, 1), "imagenet": (1, 1, 1, 1)}[stem]  # left, right, top, bottom
    x = np.random.default_rng(0).random((2, 54, 64, 3))  # 27 x 32 in front of the pool
    with torch.no_grad():
        y = reference.bn1(reference.conv1(torch.tensor(x.transpose(0, 3, 1, 2)))).relu()
        y = torch.nn.functional.pad(y, pad, value=-torch.inf)
        y = torch.nn.functional.max_pool2d(y, 3, 2)
        for layer in (reference.layer1, reference.layer2, reference.layer3, reference.layer4):
            y = layer(y)
        y = y.mean((2, 3)).numpy()
    for dtype, tolerance in (("f8", 1e-8), ("f4", 1e-4)):
        net = nn.resnet50(stem, 8).astype(dtype).eval()
        net.load_state_dict(state)
        with no_grad():
            ours = net(Tensor(x.astype(dtype))).data
        assert np.abs(ours - y).max() < tolerance * np.abs(y).max()


@pytest.mark.parametrize("wrapped", ["plain", "module.", "nested", "parameters"])
def test_pth_equals_torch(tmp_path, wrapped):
    torch = pytest.importorskip("torch")
    net = nn.resnet18(width=4)
    state = random_state(net)
    tensors = {n: torch.tensor(a) for n, a in state.items()}
    tensors["conv1.weight"] = tensors["conv1.weight"].permute(1, 0, 2, 3).contiguous().permute(
        1, 0, 2, 3)  # fmt: skip
    tensors["bn1.weight"] = torch.tensor([0.0, *state["bn1.weight"], 0.0])[1:-1]  # a view
    tensors |= {"fc.weight": torch.zeros(2, 32), "fc.bias": torch.zeros(2) > 1}  # not looked at
    if wrapped == "parameters":
        tensors = {n: torch.nn.Parameter(t, t.is_floating_point()) for n, t in tensors.items()}
    if wrapped == "module.":
        tensors = {f"module.{n}": t for n, t in tensors.items()}
    if wrapped == "nested":
        momentum = {0: {"momentum_buffer": torch.zeros(4, 3, 3, 3)}}
        tensors = {"state_dict": tensors, "epoch": 3, "lr": [0.1], "optimizer": {"state": momentum}}
    torch.save(tensors, tmp_path / "a.pth")
    assert weights.load(net, tmp_path / "a.pth") == weights.Preprocessing(32, "imagenet")
    assert_state(net, state)


def test_a_view_that_torch_negates_as_it_reads_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    net = nn.resnet10(width=4)
    tensors = {n: torch.tensor(a) for n, a in random_state(net).items()}
    zeros = torch.zeros_like(tensors["conv1.weight"])
    tensors["conv1.weight"] = torch.complex(zeros, -tensors["conv1.weight"]).conj().imag
    assert tensors["conv1.weight"].is_neg()  # stored with the other sign
    torch.save(tensors, tmp_path / "a.pth")
    with pytest.raises(DataError, match="_rebuild_tensor_v2"):
        weights.load(net, tmp_path / "a.pth")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_floats_are_cast(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    net = nn.resnet10(width=4)
    state = {n: torch.tensor(a) for n, a in random_state(net).items()}
    state = {n: t.to(getattr(torch, dtype)) if t.ndim else t for n, t in state.items()}
    torch.save(state, tmp_path / "a.pth")
    save_file(state, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        net = nn.resnet10(width=4)
        weights.load(net, tmp_path / name)
        assert_state(net, {n: t.float().numpy() for n, t in state.items()})


def test_keras_gives_inception_up_to_mixed8(tmp_path):
    net = nn.inception_v3()
    state = {
        n: a for n, a in net.state_dict().items() if not n.startswith(("Mixed_7b", "Mixed_7c"))
    }
    state = {n: a + 1 if "running_var" in n else a for n, a in state.items()}
    state["Conv2d_1a_3x3.conv.weight"][0, 0, 0, 2] = 9
    write_keras(tmp_path / "k.h5", state, ("beta", "moving_mean", "moving_variance"))
    with h5py.File(tmp_path / "k.h5", "a") as f:  # the classifier, which is left out
        f["predictions/predictions/kernel:0"] = np.zeros((2048, 10), "f4")
    other = nn.inception_v3(seed=1)
    other.Conv2d_1a_3x3.bn.weight.data[:] = 2  # in the file, it is 1 and left out
    later = other.state_dict()["Mixed_7b.branch1x1.conv.weight"]
    preprocessing = weights.load(other, tmp_path / "k.h5", until="mixed8")
    assert preprocessing == weights.Preprocessing(299, "symmetric")
    assert_state(other, state)
    assert_state(other, {"Mixed_7b.branch1x1.conv.weight": later})
    with pytest.raises(DataError, match=r"k.h5 does not fit this model: 90 missing \([^()]*\)$"):
        weights.load(other, tmp_path / "k.h5")
    with pytest.raises(ConfigError, match=r"'mixed12': this model has .* mixed10$"):
        weights.load(other, tmp_path / "k.h5", until="mixed12")


def test_a_resnet_made_with_keras_is_not_taken_for_torchvision_s(tmp_path):
    state = nn.resnet18("cifar", width=8).state_dict()
    kernels = names.as_made([name for name, array in state.items() if array.ndim == 4])
    means = names.as_made([name for name in state if name.endswith(names.MEAN)])
    with h5py.File(tmp_path / "k.h5", "w") as f:
        for i, name in enumerate(kernels):
            f[f"conv2d_{i}/kernel:0"] = state[name].transpose(2, 3, 1, 0)
        for i, name in enumerate(means):
            for ours, theirs in names.NORM.items():
                norm = f"batch_normalization_{i}/{theirs}:0"
                f[norm] = state[name.replace(names.MEAN, ours)]
    with pytest.raises(DataError, match="20 convolutions are no network of ours"):
        weights.encoder(tmp_path / "k.h5")


def test_a_whole_keras_model_is_read_without_its_optimizer(tmp_path):
    with h5py.File(tmp_path / "k.h5", "w") as f:
        f["model_weights/conv2d/conv2d/kernel:0"] = np.zeros((3, 3, 3, 2), "f4")
        f["optimizer_weights/Adam/conv2d/kernel:0"] = np.ones((3, 3, 3, 2), "f4")
    stored = weights.read(tmp_path / "k.h5")
    assert list(stored.specs) == ["conv2d/kernel"] and not stored.fetch("conv2d/kernel").any()


def test_files_are_read_where_nothing_can_be_locked(tmp_path):
    """As on a network drive without locks: HDF5 fails as it does where another has the lock."""
    fcntl = pytest.importorskip("fcntl")
    with h5py.File(tmp_path / "k.h5", "w") as f:
        f["conv2d/conv2d/kernel:0"] = np.ones((3, 3, 3, 2), "f4")
    checkpoint.save(tmp_path / "c.h5", {"a": np.ones(3)}, {})
    with (tmp_path / "k.h5").open() as keras, (tmp_path / "c.h5").open() as ours:
        fcntl.flock(keras, fcntl.LOCK_EX)
        fcntl.flock(ours, fcntl.LOCK_EX)
        assert weights.read(tmp_path / "k.h5").fetch("conv2d/kernel").all()
        assert checkpoint.load(tmp_path / "c.h5")[0]["a"].all()


def test_torchvision_s_second_classifier_is_left_out(tmp_path):
    state = nn.inception_v3(seed=1).state_dict()
    extra = {"AuxLogits.fc.weight": np.zeros((2, 3), "f4")}
    extra["AuxLogits.conv0.conv.weight"] = np.zeros((4, 4, 1, 1), "f4")
    safetensors.write(tmp_path / "a", state | extra, {})
    loaded, preprocessing = weights.encoder(tmp_path / "a")
    assert preprocessing == weights.Preprocessing(299, "symmetric")
    assert_state(loaded, state)


def test_safetensors_both_ways(tmp_path):
    official = pytest.importorskip("safetensors.numpy")
    net = nn.resnet10(width=4)
    state = random_state(net)
    net.load_state_dict(state)
    weights.save(net, tmp_path / "ours.safetensors", weights.Preprocessing(48), encoder="x", step=7)
    theirs = official.load_file(tmp_path / "ours.safetensors")
    assert sorted(theirs) == sorted(state)
    for name, array in theirs.items():
        np.testing.assert_array_equal(array, state[name])
    official.save_file(state, tmp_path / "theirs.safetensors")
    for name in ("ours", "theirs"):
        other = nn.resnet10(width=4, seed=3)
        weights.load(other, tmp_path / f"{name}.safetensors")
        assert_state(other, state)
    stored = weights.read(tmp_path / "ours.safetensors")
    assert stored.metadata["encoder"] == "x" and stored.metadata["step"] == "7"
    assert len(stored.metadata["sha256"]) == 64
    assert int.from_bytes((tmp_path / "ours.safetensors").read_bytes()[:8], "little") % 8 == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.resnet_small("cifar", 4),
        lambda: nn.resnet10("small", 4),
        lambda: nn.resnet18("imagenet", 4),
        lambda: nn.resnet34("cifar", 4),
        lambda: nn.resnet50("simclr", 4),
        lambda: nn.inception_v3(),
    ],
)
def test_the_network_is_found_by_shape(tmp_path, make):
    net = make()
    weights.save(net, tmp_path / "a", weights.Preprocessing(77, "symmetric"))
    found, preprocessing = weights.encoder(tmp_path / "a")
    assert type(found) is type(net) and getattr(found, "stem", 0) == getattr(net, "stem", 0)
    assert preprocessing == weights.Preprocessing(77, "symmetric")
    assert_state(found, net.state_dict())


@pytest.mark.parametrize(
    "make, stem",
    [
        (nn.resnet_small, "small"),
        *((make, "cifar") for make in (nn.resnet10, nn.resnet18, nn.resnet34, nn.resnet50)),
        (lambda width: nn.resnet18("imagenet", width), "imagenet"),
    ],
)
def test_the_stem_of_foreign_weights_is_the_usual_one(tmp_path, make, stem):
    """Of `small` and `cifar` only the stride differs, which no shape shows."""
    safetensors.write(tmp_path / "a.safetensors", make(width=4).state_dict(), {})
    assert weights.encoder(tmp_path / "a.safetensors")[0].stem == stem


def test_networks_may_be_four_times_as_wide_as_usual(tmp_path):
    wide = {n: tuple(64 * k if k > 3 else k for k in s)
            for n, s in nn.resnet_small(width=4).shapes().items()}  # fmt: skip
    stored = Stored(
        tmp_path, "safetensors", {n: Spec(s, "float32") for n, s in wide.items()}, Mock()
    )
    assert weights.network(stored).shapes() == wide


def test_large_networks_of_others_take_large_pictures(tmp_path):
    net = nn.resnet18("imagenet", 4)
    safetensors.write(tmp_path / "a", net.state_dict(), {})
    assert weights.load(net, tmp_path / "a") == weights.Preprocessing(224, "imagenet")
    weights.save(net, tmp_path / "b", weights.Preprocessing(np.float64(77)))
    assert weights.load(net, tmp_path / "b").size == 77


def test_weights_are_for_one_stem(tmp_path):
    """A convolution of stride 1 takes those of stride 2 as well, and means something else."""
    net = nn.resnet_small(width=4)
    weights.save(net, tmp_path / "a.safetensors", weights.Preprocessing(32))
    run = new_run(tmp_path, ms.TrainConfig(width=4))
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "checkpoints").mkdir()
    run.save()
    for path in (tmp_path / "a.safetensors", *tmp_path.glob("checkpoints/*.h5")):
        with pytest.raises(
            DataError, match="is for the stem 'small', and this network has 'cifar'"
        ):
            weights.load(nn.resnet_small("cifar", width=4), path)
        weights.load(nn.resnet_small(width=4), path)
    with pytest.raises(DataError, match=r"is for the stem 'simclr', and this .* 'imagenet'"):
        weights.load(nn.resnet50("imagenet", 1), SIMCLR)
    config = ms.TrainConfig(encoder="resnet10", stem="small", width=2)  # not the usual one
    run = new_run(make_run_folder(tmp_path / "run", config, {}), config)
    run.save()
    assert weights.encoder(run.path)[0].stem == "small"


def test_what_does_not_fit_is_told_and_changes_nothing(tmp_path):
    net = nn.resnet10(width=4)
    before, good = net.state_dict(), random_state(net)
    bad = {
        "1 missing .bn1.bias": {n: a for n, a in good.items() if n != "bn1.bias"},
        "1 unexpected .bn1.scale": good | {"bn1.scale": np.zeros(3)},
        r"bn1.bias: shape \(5,\) for \(4,\)": good | {"bn1.bias": np.zeros(5)},
        r"conv1.weight: shape \(3, 4": good | {"conv1.weight": np.zeros((3, 4, 3, 3), "f4")},
        "bn1.bias is of type int64": good | {"bn1.bias": np.zeros(4, np.int64)},
        "num_batches_tracked is of type float32": good | {"bn1.num_batches_tracked": np.float32(1)},
        "num_batches_tracked is of type int32": good | {"bn1.num_batches_tracked": np.int32(1)},
        "layer4.0.bn2.bias holds NaN": good | {"layer4.0.bn2.bias": np.full(32, np.nan)},
        "bn2.weight holds NaN": good | {"layer4.0.bn2.weight": np.full(32, np.inf)},
        "conv1.weight holds NaN": good | {"conv1.weight": np.full((4, 3, 3, 3), 1e300)},
        "bn1.running_var holds.*negative": good | {"bn1.running_var": np.full(4, -1.0)},
        "two models fit": {p + n: a for n, a in good.items() for p in ("q.", "k.")},
    }
    for message, state in bad.items():
        state = {n: np.asarray(a) for n, a in state.items()}
        safetensors.write(tmp_path / "a", state, {})
        with pytest.raises(DataError, match=message):
            weights.load(net, tmp_path / "a")
        assert_state(net, before)


def test_one_of_two_models_is_kept_as_the_guide_says(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    net = nn.resnet18(width=4)
    models = {name: random_state(net, seed) for seed, name in enumerate(("q", "k"))}
    both = {f"encoder_{m}.{n}": torch.tensor(a) for m, s in models.items() for n, a in s.items()}
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": both}, "OLD.pth")
    with pytest.raises(DataError, match=r"two models fit, 'state_dict\.encoder_q\.' and"):
        weights.encoder("OLD.pth")
    guide = (Path(__file__).parents[1] / "docs/weights.md").read_text("utf-8")
    lines = re.search(r"    import torch\n\n    state = .*\n    torch.save.*\n", guide)[0]
    exec(textwrap.dedent(lines), {})
    assert_state(weights.encoder("NEW.pth")[0], models["q"])


def test_classifiers_and_counters_may_be_there_or_not(tmp_path):
    net = nn.resnet10(width=4)
    state = random_state(net)
    state = {n: a for n, a in state.items() if "tracked" not in n}
    extra = {"fc.weight": np.zeros((10, 32), "f4"), "fc.bias": np.zeros(10, "f4")}
    safetensors.write(tmp_path / "a", state | extra, {})
    weights.load(net, tmp_path / "a")
    assert_state(net, state)
    average = {"ema.conv1.weight": np.zeros((4, 3, 3, 3), "f4")}  # a part of another model
    safetensors.write(tmp_path / "b", average | {f"net.{n}": a for n, a in state.items()}, {})
    weights.load(other := nn.resnet10(width=4), tmp_path / "b")
    assert_state(other, state)


def test_preprocessing():
    images = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3)).astype(np.uint8)
    x = weights.Preprocessing(6, "imagenet")(images)
    expected = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(x, expected, atol=1e-5)
    assert weights.Preprocessing(9, "symmetric")(images).shape == (2, 9, 9, 3)
    x = weights.Preprocessing(6, "symmetric")(images)
    np.testing.assert_allclose(x, images / 127.5 - 1, atol=1e-5)
    np.testing.assert_array_equal(weights.Preprocessing(4)(images), center_view(images, 4))
    wide = np.zeros((1, 6, 8, 3), np.uint8)
    wide[:, :, 6:] = 255
    x = weights.Preprocessing(4, "symmetric")(wide)
    assert (x[:, :, :2] == -1).all() and (x[:, :, 3] > 0.5).all()
    weights.Preprocessing(4096)
    for bad in ((0, "unit"), (5000, "unit"), (9, "pixels")):
        with pytest.raises(ValueError, match="unknown preprocessing"):
            weights.Preprocessing(*bad)


def test_crc32c():
    def unmasked(data):
        turned = masked_crc32c(data) - 0xA282EAD8 & 0xFFFFFFFF
        return (turned >> 17 | turned << 15) & 0xFFFFFFFF

    # RFC 3720, B.4
    assert unmasked(b"123456789") == 0xE3069283
    assert unmasked(bytes(32)) == 0x8A9136AA
    assert unmasked(bytes(range(32))) == 0x46DD794E


def cli(arguments, code=0):
    from minisimclr.cli import main

    with pytest.raises(SystemExit) as exit:
        main([str(a) for a in arguments])
    assert exit.value.code == code


def test_command_line(tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    cli(["weights", "import", SIMCLR, "--out", out])
    assert capsys.readouterr().out == f"{out}: ResNet, input {weights.Preprocessing(224)}\n"
    cli(["weights", "import", SIMCLR, "--out", out], 2)
    assert "out.safetensors' exists" in capsys.readouterr().err
    cli(["weights", "inspect", out])
    listing = capsys.readouterr().out
    assert "safetensors, 318 arrays" in listing and "simclr" in listing
    assert "float32    1x3x7x7            conv1.weight\n" in listing
    (out.parent / "alone.index").write_bytes(Path(f"{SIMCLR}.index").read_bytes())
    cli(["weights", "import", out.parent / "alone", "--out", out.parent / "no.safetensors"], 3)
    assert "cannot be read: alone.data-00000-of-00001: No such file" in capsys.readouterr().err
    cli(["weights", "inspect", f"{SIMCLR}.index", "--json"])
    values = json.loads(capsys.readouterr().out)
    assert values["format"] == "TensorFlow checkpoint"
    assert values["arrays"]["base_model/conv2d/kernel"] == {
        "shape": [7, 7, 3, 1],
        "dtype": "float32",
    }
    cli(["weights", "inspect", tmp_path / "absent"], 3)
    assert "absent: cannot be read: No such file" in capsys.readouterr().err


def test_import_of_a_part_writes_that_part_alone(tmp_path):
    part, out = tmp_path / "part.safetensors", tmp_path / "out.safetensors"
    net = nn.inception_v3()
    weights.save(net, part, weights.Preprocessing(299, "symmetric"), until="mixed4")
    cli(["weights", "import", part, "--out", out, "--until", "mixed4"])
    written, state = weights.read(out), net.state_dict()
    assert weights.encoder(out, "mixed4")[1] == weights.Preprocessing(299, "symmetric")
    assert written.specs == weights.read(part).specs and len(written.specs) < len(state)
    for name in written.specs:
        np.testing.assert_array_equal(written.fetch(name), state[name])


def test_a_prefix_may_be_any_name(tmp_path):
    net, other = (nn.resnet10("cifar", width=4, seed=s) for s in (0, 1))
    named = {f"my_variant.{name}": array for name, array in net.state_dict().items()}
    weights.safetensors.write(tmp_path / "a", named, {})
    weights.load(other, tmp_path / "a")
    assert_state(other, net.state_dict())


@pytest.mark.parametrize("command", [("import", SIMCLR), ("export", "run")])
def test_where_weights_cannot_be_written_none_are_read(command, tmp_path, capsys, monkeypatch):
    for place in ("minisimclr.weights.encoder", "minisimclr.embed.open_trained"):
        monkeypatch.setattr(place, Mock(side_effect=AssertionError))
    (tmp_path / "file").touch()
    cli(["weights", *command, "--out", tmp_path / "file" / "a.safetensors"], 4)
    assert "cannot write to" in capsys.readouterr().err


def test_the_newest_checkpoint_of_a_run_is_read(tmp_path):
    make_run_folder(tmp_path / "run", config := ms.TrainConfig(width=2), {})
    run = new_run(tmp_path / "run", config)
    for run.step in (7, 8):
        run.save()
    assert weights.read(run.path).path == run.saved_at


def test_a_checkpoint_s_stem_follows_the_side_of_its_views(tmp_path):
    config = ms.TrainConfig(encoder="resnet10", image_size=64, width=2)
    run = new_run(make_run_folder(tmp_path / "run", config, {}), config)
    run.save()
    assert weights.encoder(run.path)[0].stem == run.model.encoder.stem == "imagenet"


def test_a_file_is_read_though_an_index_has_its_name_too(tmp_path):
    safetensors.write(tmp_path / "a", {"x": np.zeros(1, "f4")}, {})
    (tmp_path / "a.index").touch()
    assert weights.read(tmp_path / "a").format == "safetensors"


@pytest.mark.parametrize("said", [{"size": "big"}, {"size": "0"}, {"pixels": "?"}, {"stem": "?"}])
def test_metadata_that_make_no_sense_are_a_fault_of_their_file(said, tmp_path):
    safetensors.write(tmp_path / "a", nn.resnet10(width=4).state_dict(), said)
    with pytest.raises(DataError, match="a: cannot be read: "):
        weights.encoder(tmp_path / "a")


def test_a_counter_may_be_large(tmp_path, capsys):
    net, many = nn.resnet10(width=4), np.array(2**24 + 1)
    safetensors.write(tmp_path / "a", random_state(net) | {"bn1.num_batches_tracked": many}, {})
    weights.load(net, tmp_path / "a")
    assert net.state_dict()["bn1.num_batches_tracked"] == many
    cli(["weights", "inspect", tmp_path / "a"])
    assert f"int64      {'scalar':<18} bn1.num_batches_tracked\n" in capsys.readouterr().out


@pytest.mark.parametrize("width", [0, 1 << 40])
def test_no_network_has_so_few_or_many_channels(width, tmp_path):
    specs = {f"{i}.weight": Spec((width, 3, 3, 3), "float32") for i in range(12)}
    with pytest.raises(DataError, match="12 convolutions are no network of ours"):
        weights.network(Stored(tmp_path, "safetensors", specs, None))


def test_arrays_of_another_byte_order_are_written_as_all(tmp_path):
    safetensors.write(tmp_path / "a", {"x": np.arange(3, dtype=">f4")}, {})
    assert weights.read(tmp_path / "a").fetch("x").tolist() == [0, 1, 2]
    safetensors.write(tmp_path / "b", {"x": np.asfortranarray([[0, 1], [2, 3]])}, {})
    assert weights.read(tmp_path / "b").fetch("x").tolist() == [[0, 1], [2, 3]]


def test_the_side_of_stored_pictures_is_rounded():
    assert [weights.Preprocessing(s).stored for s in (28, 32, 224)] == [32, 37, 256]


def test_a_run_is_exported(tmp_path, capsys):
    path = tmp_path / "run"
    config = ms.TrainConfig(image_size=24, width=2)
    make_run_folder(path, config, {})
    cli(["weights", "export", path, "--out", tmp_path / "a.safetensors"], 3)
    assert "has no checkpoint yet" in capsys.readouterr().err
    cli(["weights", "export", path, "--out", tmp_path / "a.pth"], 2)
    assert "a.pth' must end in .safetensors" in capsys.readouterr().err
    run = new_run(path, config)
    run.step = 7
    run.save()
    cli(["weights", "export", path, "--out", tmp_path / "a.safetensors"])
    assert f"a.safetensors: {config.encoder} at step 7\n" in capsys.readouterr().out
    encoder, preprocessing = weights.encoder(tmp_path / "a.safetensors")
    assert_state(encoder, run.model.encoder.state_dict())
    assert preprocessing == weights.Preprocessing(24) and encoder.stem == "small"
    metadata = weights.read(tmp_path / "a.safetensors").metadata
    assert json.loads(metadata["config"])["image_size"] == 24
    assert (metadata["step"], metadata["encoder"]) == ("7", config.encoder)
    newest = sorted((path / "checkpoints").glob("*.h5"))[-1]
    for itself in newest, path:  # a checkpoint is read, too, and a run's folder for its newest
        assert weights.read(itself).path == newest
        same, preprocessing = weights.encoder(itself)
        assert_state(same, encoder.state_dict())
        assert preprocessing == weights.Preprocessing(24)


def test_paths_may_be_text_and_a_folder_is_no_file(tmp_path):
    net = nn.resnet10("cifar", width=4)
    weights.save(net, str(tmp_path / "w.safetensors"), weights.Preprocessing(32))
    assert weights.encoder(str(tmp_path / "w.safetensors"))[0].shapes() == net.shapes()
    for path in (".", "/", tmp_path):
        with pytest.raises(DataError, match=r"cannot be read: (?!ValueError)"):
            weights.read(path)
    (tmp_path / "text").write_text("no weights")
    with pytest.raises(DataError, match="text: cannot be read: neither PyTorch"):
        weights.read(tmp_path / "text")


def test_parameters_of_the_module_itself_and_of_a_single_layer_are_kept(tmp_path):
    class Mixer(nn.Module):
        def __init__(self, seed):
            rng = np.random.default_rng(seed)
            self.place = ms.Parameter(rng.standard_normal((1, 4, 3), np.float32))
            self.fc = nn.Linear(3, 3, rng=rng)  # a classifier's name, but the module's own

    for i, (first, second) in enumerate(
        [(Mixer(0), Mixer(1)), [nn.Linear(3, 4, rng=np.random.default_rng(i)) for i in range(2)]]
    ):
        weights.save(first, tmp_path / f"{i}.safetensors", weights.Preprocessing(16))
        weights.load(second, tmp_path / f"{i}.safetensors")
        assert_state(second, first.state_dict())
