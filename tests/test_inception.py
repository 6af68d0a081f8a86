"""InceptionV3: torchvision's names, an independent torch network's numbers, real weights."""

import numpy as np
import pytest
from PIL import Image

import minisimclr as ms
from minisimclr import weights
from minisimclr.errors import ConfigError
from minisimclr.tensor import Tensor, no_grad


def torch_inception(dtype):
    """The network in torch, branches spelled out, random weights and statistics."""
    torch = pytest.importorskip("torch")
    nn, functional = torch.nn, torch.nn.functional

    class Unit(nn.Module):
        def __init__(self, i, o, k=(1, 1), s=1, p=(0, 0)):
            super().__init__()
            self.conv = nn.Conv2d(i, o, k, s, p, bias=False)
            self.bn = nn.BatchNorm2d(o, eps=0.001)

        def forward(self, x):
            return self.bn(self.conv(x)).relu()

    def average(x):
        return functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def join(*branches):
        return torch.cat(branches, 1)

    wide, tall = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
    three, half = ((3, 3), 1, (1, 1)), ((3, 3), 2, (0, 0))

    def pools(i, o):
        b = nn.Module()
        b.branch1x1 = Unit(i, 64)
        b.branch5x5_1, b.branch5x5_2 = Unit(i, 48), Unit(48, 64, (5, 5), 1, (2, 2))
        b.branch3x3dbl_1, b.branch3x3dbl_2 = Unit(i, 64), Unit(64, 96, *three)
        b.branch3x3dbl_3, b.branch_pool = Unit(96, 96, *three), Unit(i, o)
        return b

    def sevens(o):
        b = nn.Module()
        b.branch1x1, b.branch7x7_1 = Unit(768, 192), Unit(768, o)
        b.branch7x7_2, b.branch7x7_3 = Unit(o, o, *wide), Unit(o, 192, *tall)
        b.branch7x7dbl_1, b.branch7x7dbl_2 = Unit(768, o), Unit(o, o, *tall)
        b.branch7x7dbl_3, b.branch7x7dbl_4 = Unit(o, o, *wide), Unit(o, o, *tall)
        b.branch7x7dbl_5, b.branch_pool = Unit(o, 192, *wide), Unit(768, 192)
        return b

    def last(i):
        b = nn.Module()
        b.branch1x1, b.branch3x3_1 = Unit(i, 320), Unit(i, 384)
        b.branch3x3_2a = Unit(384, 384, (1, 3), 1, (0, 1))
        b.branch3x3_2b = Unit(384, 384, (3, 1), 1, (1, 0))
        b.branch3x3dbl_1, b.branch3x3dbl_2 = Unit(i, 448), Unit(448, 384, *three)
        b.branch3x3dbl_3a = Unit(384, 384, (1, 3), 1, (0, 1))
        b.branch3x3dbl_3b = Unit(384, 384, (3, 1), 1, (1, 0))
        b.branch_pool = Unit(i, 192)
        return b

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Unit(3, 32, *half), Unit(32, 32, (3, 3))
            self.Conv2d_2b_3x3, self.Conv2d_3b_1x1 = Unit(32, 64, *three), Unit(64, 80)
            self.Conv2d_4a_3x3 = Unit(80, 192, (3, 3))
            self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = (
                pools(192, 32),
                pools(256, 64),
                pools(288, 64),
            )
            b = self.Mixed_6a = nn.Module()
            b.branch3x3, b.branch3x3dbl_1 = Unit(288, 384, *half), Unit(288, 64)
            b.branch3x3dbl_2, b.branch3x3dbl_3 = Unit(64, 96, *three), Unit(96, 96, *half)
            self.Mixed_6b, self.Mixed_6c = sevens(128), sevens(160)
            self.Mixed_6d, self.Mixed_6e = sevens(160), sevens(192)
            b = self.Mixed_7a = nn.Module()
            b.branch3x3_1, b.branch3x3_2 = Unit(768, 192), Unit(192, 320, *half)
            b.branch7x7x3_1, b.branch7x7x3_2 = Unit(768, 192), Unit(192, 192, *wide)
            b.branch7x7x3_3, b.branch7x7x3_4 = Unit(192, 192, *tall), Unit(192, 192, *half)
            self.Mixed_7b, self.Mixed_7c = last(1280), last(2048)

        def forward(self, x):
            pool = nn.MaxPool2d(3, 2)
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
            x = pool(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(pool(x))))
            for b in (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d):
                double = b.branch3x3dbl_3(b.branch3x3dbl_2(b.branch3x3dbl_1(x)))
                five = b.branch5x5_2(b.branch5x5_1(x))
                x = join(b.branch1x1(x), five, double, b.branch_pool(average(x)))
            b = self.Mixed_6a
            double = b.branch3x3dbl_3(b.branch3x3dbl_2(b.branch3x3dbl_1(x)))
            x = join(b.branch3x3(x), double, pool(x))
            for b in (self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e):
                seven = b.branch7x7_3(b.branch7x7_2(b.branch7x7_1(x)))
                double = b.branch7x7dbl_3(b.branch7x7dbl_2(b.branch7x7dbl_1(x)))
                double = b.branch7x7dbl_5(b.branch7x7dbl_4(double))
                x = join(b.branch1x1(x), seven, double, b.branch_pool(average(x)))
            b = self.Mixed_7a
            seven = b.branch7x7x3_3(b.branch7x7x3_2(b.branch7x7x3_1(x)))
            x = join(b.branch3x3_2(b.branch3x3_1(x)), b.branch7x7x3_4(seven), pool(x))
            mixed8 = x
            for b in (self.Mixed_7b, self.Mixed_7c):
                y, z = b.branch3x3_1(x), b.branch3x3dbl_2(b.branch3x3dbl_1(x))
                y = join(b.branch3x3_2a(y), b.branch3x3_2b(y))
                z = join(b.branch3x3dbl_3a(z), b.branch3x3dbl_3b(z))
                x = join(b.branch1x1(x), y, z, b.branch_pool(average(x)))
            return mixed8, x.mean((2, 3))

    torch.manual_seed(0)
    net = Net().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.1, 0.5),
            ):
                tensor.data.uniform_(low, high)
    return net.to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-8), ("float32", 1e-4)])
def test_equals_torch(dtype, tolerance):
    torch = pytest.importorskip("torch")
    reference = torch_inception(dtype)
    state = {name: array.numpy() for name, array in reference.state_dict().items()}
    net = ms.nn.inception_v3().astype(np.dtype(dtype)).eval()
    assert list(net.state_dict()) == list(state)
    net.load_state_dict(state)
    x = np.random.default_rng(0).uniform(-1, 1, (1, 75, 75, 3)).astype(dtype)
    with torch.no_grad(), no_grad():
        theirs = reference(torch.tensor(x.transpose(0, 3, 1, 2)))
        mixed8, h = net.features(Tensor(x), "mixed8"), net(Tensor(x))
    assert mixed8.shape == (1, 1, 1, 1280)
    for a, b in ((mixed8.data.transpose(0, 3, 1, 2), theirs[0]), (h.data, theirs[1])):
        assert a.dtype == dtype
        assert np.abs(a - b.numpy()).max() < tolerance * np.abs(b.numpy()).max()


def test_weights_are_a_function_of_the_seed():
    one, other, again = (ms.nn.inception_v3(seed=k).state_dict() for k in (0, 1, 1))
    for name in one:
        np.testing.assert_array_equal(other[name], again[name])
        assert one[name].ndim != 4 or (one[name] != other[name]).any()


def test_a_bad_block_is_named():
    with pytest.raises(ConfigError, match=r"'mixed11'.*mixed0 to mixed10"):
        ms.nn.inception_v3().features(Tensor(np.zeros((1, 75, 75, 3))), "mixed11")


def test_real_weights_tell_breeds_apart(test_data):
    """Nearest centroid of the others on pooled mixed8, ten breeds, half size."""
    net = ms.nn.inception_v3().eval()
    file = test_data / "weights" / "inception_v3_to_mixed8_float16.h5"
    preprocessing = weights.load(net, file, until="mixed8")
    assert (preprocessing.size, preprocessing.pixels) == (299, "symmetric")
    paths = sorted((test_data / "dog-photos").glob("*/*.jpg"))
    labels = np.unique([p.parent.name for p in paths], return_inverse=True)[1]
    assert len(paths) == 80 and labels.max() == 9

    photos = []
    for path in paths:
        photo = Image.open(path).convert("RGB")
        side, (w, h) = min(photo.size), photo.size
        box = ((w - side) // 2, (h - side) // 2, (w + side) // 2, (h + side) // 2)
        photos.append(np.asarray(photo.resize((149, 149), box=box)))
    x = weights.Preprocessing(149, "symmetric")(np.stack(photos))
    parts = [Tensor(x[i : i + 16]) for i in range(0, 80, 16)]
    with no_grad():
        h = np.concatenate([net.features(part, "mixed8").data.mean((1, 2)) for part in parts])
    h = h / np.linalg.norm(h, axis=1, keepdims=True)  # (80, 1280)
    right = 0
    for i in range(80):
        others = np.arange(80) != i
        centroids = np.stack([h[others & (labels == k)].mean(0) for k in range(10)])
        right += (centroids @ h[i]).argmax() == labels[i]
    assert right / 80 > 0.5  # chance is 0.1
    with no_grad():
        mixed8 = net.features(Tensor(preprocessing(photos[0][None])), "mixed8")
    assert mixed8.shape == (1, 8, 8, 1280)
