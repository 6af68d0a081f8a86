"""Damaged and hostile files of weights: one DataError each, nothing executed, nothing loaded."""

import hashlib
import io
import pickle
import struct
import sys
import tarfile
import zipfile

import h5py
import numpy as np
import pytest

from minisimclr import checkpoint, nn, weights
from minisimclr.errors import DataError
from minisimclr.weights import safetensors
from minisimclr.weights.tf_bundle import MAGIC, masked_crc32c
from minisimclr.weights.torch_zip import unpickle

FORBIDDEN = ("exec", "compile", "import", "os.", "subprocess.", "pickle.find_class", "socket.",
             "ctypes.", "shutil.", "marshal.")  # fmt: skip
events: list[str] | None = None


def hook(event, arguments):
    # A run's folder is listed, and Python 3.13 lists what is none.
    if events is not None and event.startswith(FORBIDDEN) and event != "os.scandir":
        events.append(f"{event} {arguments}")


sys.addaudithook(hook)
for codec in ("cp437", "raw_unicode_escape", "unicode_escape", "latin-1", "utf-8"):
    "".encode(codec)  # Python imports these when first used


class Tiny(nn.Module):
    def __init__(self):
        self.conv1 = nn.Conv2d(3, 2, 3, rng=np.random.default_rng(0))
        self.bn1 = nn.BatchNorm(2)


STATE = {
    name: np.random.default_rng(0).uniform(0.5, 1, array.shape).astype("f4")
    for name, array in Tiny().state_dict().items()
    if array.ndim
}


def attempt(path, refused=True):
    """Load `path`, watched. A DataError in one line is fine; so is success where allowed."""
    global events
    net = Tiny()
    before = net.state_dict()
    events = []
    try:
        weights.load(net, path)
    except DataError as error:
        message = str(error)
    else:
        message = None
    finally:
        seen, events = events, None
    assert not seen
    after = net.state_dict()
    if message is None:
        assert not refused
        assert all(np.isfinite(array).all() for array in after.values())
        return None
    assert "\n" not in message and str(path) in message, message
    assert all((after[name] == before[name]).all() for name in before)
    return message


# Each format's writer, for files small enough to damage thousands of times.


def as_safetensors(path):
    safetensors.write(path, STATE, {})


def as_keras(path):
    names = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean",
             "running_var": "moving_variance"}  # fmt: skip
    with h5py.File(path, "w") as f:
        f["conv2d/conv2d/kernel:0"] = STATE["conv1.weight"].transpose(2, 3, 1, 0)
        for ours, theirs in names.items():
            f[f"batch_normalization/batch_normalization/{theirs}:0"] = STATE[f"bn1.{ours}"]


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor_program(array, key, offset=0, shape=None, stride=None, size=None, kind="Float"):
    """The pickle instructions that stand for one tensor, as torch writes them."""
    shape = array.shape if shape is None else shape
    steps = [int(np.prod(array.shape[i + 1 :])) for i in range(array.ndim)]
    steps = steps if stride is None else stride

    def ints(numbers):
        return b"(" + b"".join(b"J" + struct.pack("<i", n) for n in numbers) + b"t"

    size = array.size if size is None else size
    storage = b"(" + text("storage") + f"ctorch\n{kind}Storage\n".encode() + text(key)
    storage += text("cpu") + b"J" + struct.pack("<i", size) + b"tQ"
    view = storage + b"J" + struct.pack("<i", offset) + ints(shape) + ints(steps)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + view + b"\x89ccollections\nOrderedDict\n)RtR"


def program(**changes):
    """data.pkl of a state dict; changes apply to bn1.bias."""
    parts = [b"\x80\x02ccollections\nOrderedDict\n)Rq\x00("]
    for i, (name, array) in enumerate(STATE.items()):
        kw = changes if name == "bn1.bias" else {}
        parts.append(text(name) + tensor_program(array, kw.pop("key", str(i)), **kw))
    return b"".join([*parts, b"u}", text("_metadata"), b"}sb."])


def as_pth(path, pickled=None, compression=zipfile.ZIP_STORED, extra=(), order=b"little"):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program() if pickled is None else pickled)
        archive.writestr("archive/byteorder", order)
        for i, array in enumerate(STATE.values()):
            archive.writestr(f"archive/data/{i}", array.tobytes())
        for name, content in extra:
            archive.writestr(name, content)


def varint(n):
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def message(*fields):
    """A protocol buffer of (number, integer, bytes or four bytes as `crc`)."""
    out = b""
    for number, value in fields:
        if isinstance(value, bytes):
            out += varint(number << 3 | 2) + varint(len(value)) + value
        elif number == 6:
            out += varint(number << 3 | 5) + struct.pack("<I", value)
        else:
            out += varint(number << 3) + varint(value)
    return out


def bundle(path, change=lambda entries: None, kind=0, header=((1, 1), (2, 0))):
    """NAME.index and NAME.data of STATE; `change` may edit the entries, CRCs of blocks fit."""
    names = {"conv1.weight": "conv2d/kernel", "bn1.weight": "batch_normalization/gamma",
             "bn1.bias": "batch_normalization/beta",
             "bn1.running_mean": "batch_normalization/moving_mean",
             "bn1.running_var": "batch_normalization/moving_variance"}  # fmt: skip
    data, entries = b"", {b"": message(*header)}
    for ours, theirs in names.items():
        array = STATE[ours]
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
        raw = np.ascontiguousarray(array).tobytes()
        shape = message(*((2, message((1, n))) for n in array.shape))
        entry = [(1, 1), (2, shape), (4, len(data)), (5, len(raw)), (6, masked_crc32c(raw))]
        entries[f"base_model/{theirs}".encode()] = message(*entry)
        data += raw
    change(entries)

    def block(items):
        body = b"".join(b"\0" + varint(len(k)) + varint(len(v)) + k + v for k, v in items)
        body += struct.pack("<II", 0, 1) + bytes([kind])
        return body + struct.pack("<I", masked_crc32c(body))

    first = block(entries.items())
    second = block([(b"zzz", varint(0) + varint(len(first) - 5))])
    handles = varint(0) + varint(0) + varint(len(first)) + varint(len(second) - 5)
    path.write_bytes(first + second + handles.ljust(40, b"\0") + MAGIC)
    path.with_name(path.stem + ".data-00000-of-00001").write_bytes(data)


def as_bundle(path):
    bundle(path)


WRITERS = {
    "a.safetensors": as_safetensors,
    "a.h5": as_keras,
    "a.pth": as_pth,
    "a.index": as_bundle,
}


@pytest.mark.parametrize("name", WRITERS)
def test_whole_files_load(tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert attempt(tmp_path / name, refused=False) is None
    net = Tiny()
    weights.load(net, tmp_path / name)
    for key, array in STATE.items():
        np.testing.assert_array_equal(net.state_dict()[key], array)


def mutated(data, rng):
    """`data` with one to three bytes or stretches changed, cut, moved or put in."""
    data = bytearray(data or b"x")
    for _ in range(rng.integers(1, 4)):
        at, n = int(rng.integers(len(data) or 1)), int(rng.integers(1, 9))
        match rng.integers(6):
            case 0:
                data[at : at + 1] = rng.bytes(1)
            case 1:
                data[at : at + 1] = bytes(b ^ 1 << rng.integers(8) for b in data[at : at + 1])
            case 2:
                data[at : at + n] = b""
            case 3:
                data[at:at] = rng.bytes(n)
            case 4:
                data[at : at + 8] = (b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f")[rng.integers(3)]
            case 5:
                data[at : at + n] = data[n : n + n]
    return bytes(data)


@pytest.mark.parametrize("name", [*WRITERS, "pickle", "entries"])
def test_two_thousand_mutations(tmp_path, name):
    """Of whole files; of the pickle in a sound archive; of entries in a sound index."""
    rng = np.random.default_rng(0)
    path = tmp_path / {"pickle": "a.pth", "entries": "a.index"}.get(name, name)
    WRITERS[path.name](path)
    attempt(path, refused=False)  # so that no library is imported later
    data, pickled, refused = path.read_bytes(), program(), 0

    def change(entries):
        key = list(entries)[rng.integers(len(entries))]
        value = entries.pop(key)
        if rng.integers(4):
            entries[key] = mutated(value, rng)
        else:
            entries[mutated(key, rng)] = value

    for _ in range(2000):
        if name == "pickle":
            as_pth(path, mutated(pickled, rng))
        elif name == "entries":
            bundle(path, change)
        else:
            path.write_bytes(mutated(data, rng))
        refused += attempt(path, refused=False) is not None
    assert refused > 300  # the rest hits numbers or names that nobody needs


def payloads(marker):
    """Pickles that would run `touch marker`, or fill memory or time, in one that obeys them."""
    command = text(f"touch {marker}")
    system = b"cos\nsystem\n"

    class Reduce:
        def __reduce__(self):
            return eval, (f"open({str(marker)!r}, 'w')",)

    yield from (pickle.dumps({"conv1.weight": Reduce()}, protocol) for protocol in range(6))
    yield b"\x80\x02" + system + b"(" + command + b"tR."
    yield b"\x80\x02cposix\nsystem\n" + command + b"\x85R."
    yield b"\x80\x02(ios\nsystem\n" + command + b"."
    yield b"\x80\x02(S'touch %s'\nios\nsystem\n." % str(marker).encode()
    yield b"\x80\x02(" + system + command + b"o."
    yield b"\x80\x02" + system + command + b"\x85\x81."
    yield b"\x80\x04" + text("os") + text("system") + b"\x93" + command + b"\x85R."
    yield b"\x80\x02\x82\x01."
    yield b"\x80\x02\x83\x01\x00."
    yield b"\x80\x02\x84\x01\x00\x00\x00."
    yield b"\x80\x02ccollections\nOrderedDict\n)R}" + text("__setstate__") + system + b"sb."
    yield b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + system + b"K\x00))tR."
    yield b"\x80\x02ctorch\nload\n" + text("/etc/passwd") + b"\x85R."
    yield b"\x80\x02cnumpy\nload\n" + text("/etc/passwd") + b"\x85R."
    yield b"\x80\x02P12\n."
    yield b"\x80\x02" + text("storage") + b"\x85Q."
    # Loops, depth, and growth: two to the power of sixty, were it followed.
    yield b"\x80\x02}q\x00" + text("a") + b"h\x00s."
    yield b"\x80\x02" + (b"}" + text("a")) * 5000 + b"}" + b"s" * 5000 + b"."
    yield b"\x80\x02" + b"(" * 100_000 + b"."
    yield b"\x80\x02}" + b"".join(b"q%c}(%bh%c%bh%cu" % (i, text("a"), i, text("b"), i)
                                    for i in range(60)) + b"."  # fmt: skip
    yield b"\x80\x02})" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60)) + b"Ns."  # a key
    yield b"\x80\x02}" + b"K\x01" * 10 + b"s" * 20 + b"."
    yield b"\x80\x02" + text("k" * 100_000) + b"q\x00}" + b"h\x00}" * 200 + b"s" * 200 + b"."
    yield b"\x80\x02\x8b\xff\xff\xff\x7f."
    yield b"\x80\x02r\xff\xff\xff\xff."
    yield b""
    yield b"\x80\x02"


def test_pickles_run_nothing(tmp_path):
    marker = tmp_path / "marker"
    for payload in payloads(marker):
        as_pth(tmp_path / "a.pth", payload)
        attempt(tmp_path / "a.pth")
    as_pth(tmp_path / "a.pth", b"\x80\x02cos\nsystem\n" + text("true") + b"\x85R.")
    assert "it calls 'os system': save" in attempt(tmp_path / "a.pth")
    as_pth(tmp_path / "a.pth", b"\x80\x02ca\\nb\nc\n)R.")  # a name that holds a line break
    assert "it calls 'a" in attempt(tmp_path / "a.pth")
    as_pth(tmp_path / "a.pth", program()[:-1] + b"\x82\x01.")  # all is there, and more
    assert "pickle instruction EXT1" in attempt(tmp_path / "a.pth")
    for protocol in (0, 1, 2, 4):  # and bare
        for payload in (pickle.dumps(STATE, protocol), next(payloads(marker))):
            (tmp_path / "bare.pth").write_bytes(payload)
            attempt(tmp_path / "bare.pth")
    assert not marker.exists()


def test_pth_archives(tmp_path):
    path = tmp_path / "a.pth"
    cases = {
        "compressed": {"compression": zipfile.ZIP_DEFLATED},
        "compressed, doubled": {
            "compression": zipfile.ZIP_DEFLATED,
            "extra": [("archive/data/9", bytes(1 << 24))],
        },
        "little-endian": {"order": b"big"},
        "TorchScript.*torch.jit.load": {"extra": [("archive/code/__torch__.py", b"x")]},
        "doubled or missing": {"extra": [("other/data.pkl", program())]},
        "data/77": {"pickled": program(key="77")},
        r"shape \(3,\) for \(2,\)": {"pickled": program(shape=(3,))},
        "impossible shape": {"pickled": program(shape=(-2,))},
        "impossible shape or": {"pickled": program(stride=(-1,))},
        "impossible shape or ": {"pickled": program(key="0", offset=-2)},
        "name that is too long": {"pickled": b"\x80\x02}" + text("k" * 1001) + b"Ns."},
        "strides": {"pickled": program(offset=1)},
        "strides ": {"pickled": program(stride=(1 << 30,))},
        "'Quantized'": {"pickled": program(kind="Quantized")},
        "of type int64|strides": {"pickled": program(kind="Long")},
    }
    for expected, changes in cases.items():
        as_pth(path, **changes)
        with pytest.raises(DataError, match=expected.strip()):
            weights.load(Tiny(), path)
        attempt(path)
    with pytest.warns(UserWarning, match="Duplicate name"):
        as_pth(path, extra=[("archive/data/0", bytes(216))])
    assert "doubled" in attempt(path)
    as_pth(path)
    damaged = path.read_bytes().replace(STATE["conv1.weight"].tobytes()[:8], bytes(8))
    path.write_bytes(damaged)
    assert "CRC" in attempt(path)


def test_legacy_pth_is_refused_with_its_conversion(tmp_path):
    path = tmp_path / "old.pth"
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
    path.write_bytes(magic + pickle.dumps(1001, protocol=2))
    assert "torch.save(torch.load('OLD.pth', 'cpu', weights_only=True), 'NEW.pth')" in attempt(path)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("pickle"), io.BytesIO())
    assert "torch.load" in attempt(path)


def header(text, data=bytes(8)):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw + data


def braces(*items):
    return "{" + ",".join(items) + "}"


GOOD = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
HEADERS = {
    "fine": header(braces(GOOD)),
    "spaces": header(f" {braces(GOOD)}\n "),
    "metadata": header(braces(GOOD, '"__metadata__":{"k":"v"}')),
    "no metadata": header(braces(GOOD, '"__metadata__":null')),
    "empty": header("{}", b""),
    "scalar": header('{"a":{"dtype":"F64","shape":[],"data_offsets":[0,8]}}'),
    "no numbers": header(braces('"b":{"dtype":"F32","shape":[0],"data_offsets":[8,8]}', GOOD)),
    "metadata of numbers": header(braces(GOOD, '"__metadata__":{"k":1}')),
    "huge header": struct.pack("<Q", 1 << 62) + b"{}",
    "longer than the file": struct.pack("<Q", 100) + b"{}",
    "hole": header(braces(GOOD.replace("[0,8]", "[4,12]")), bytes(12)),
    "late": header(braces(GOOD.replace("[0,8]", "[4,8]"))),
    "overlap": header(braces(GOOD, GOOD.replace('"a"', '"b"').replace("0,8", "4,12")), bytes(12)),
    "trailing": header(braces(GOOD), bytes(9)),
    "short": header(braces(GOOD), bytes(7)),
    "wrong size": header(braces(GOOD.replace("[2]", "[3]"))),
    "overflow": header(braces(GOOD.replace("[2]", "[4294967296,4294967296,2]"))),
    "negative": header(braces(GOOD.replace("[2]", "[-2,-1]"))),
    "backwards": header(braces(GOOD.replace("[0,8]", "[8,0]"))),
    "float shape": header(braces(GOOD.replace("[2]", "[2.0]"))),
    "true shape": header(braces(GOOD.replace("[2]", "[true,2]"))),
    "no shape": header(braces(GOOD.replace('"shape":[2],', ""))),
    "dtype": header(braces(GOOD.replace("F32", "f32"))),
    "NaN": header(braces(GOOD.replace("[2]", "[NaN]"))),
    "NaN elsewhere": header(braces(GOOD[:-1] + ',"x":NaN}')),
    "more keys": header(braces(GOOD[:-1] + ',"x":1}')),
    "deep": header('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"),
    "not UTF-8": header(b'{"\xff":1}'),
    "surrogate": header(braces(GOOD.replace('"a"', '"\\ud800"'))),
    "list": header("[1]"),
    "null": header("null"),
    "no JSON": header(braces(GOOD)[:-1]),
}


@pytest.mark.parametrize("name", HEADERS)
def test_safetensors_headers_like_the_official_reader(tmp_path, name):
    official = pytest.importorskip("safetensors")
    (tmp_path / "a").write_bytes(HEADERS[name])
    try:
        official.deserialize(HEADERS[name])
        theirs = True
    except official.SafetensorError:
        theirs = False
    try:
        weights.read(tmp_path / "a")
        ours = True
    except DataError:
        ours = False
    assert ours == theirs


def test_safetensors_mutations_like_the_official_reader(tmp_path):
    official = pytest.importorskip("safetensors")
    rng = np.random.default_rng(1)
    path = tmp_path / "a"
    verdicts = []
    for _ in range(1000):
        data = mutated(HEADERS["metadata"], rng)
        path.write_bytes(data)
        try:
            official.deserialize(data)
            theirs = True
        except official.SafetensorError:
            theirs = False
        try:
            weights.read(path)
            ours = True
        except DataError as error:
            ours = theirs and "cannot be printed" in str(error)
        verdicts.append(ours)
        assert ours == theirs, data
    assert 10 < sum(verdicts) < 990


def test_stricter_than_the_official_reader(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(header(braces(GOOD, GOOD)))
    with pytest.raises(DataError, match="twice"):
        weights.read(path)
    for name in ("", "bell\a", "two\nlines", "\x1b[2J"):
        safetensors.write(path, STATE | {name: np.zeros(1, "f4")}, {})
        assert "a name that cannot be printed" in attempt(path)
    as_safetensors(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="SHA-256"):
        weights.read(path)


def replace(f, make):
    place = "conv2d/conv2d/kernel:0"
    array = f[place][()]
    del f[place]
    make(f, place, array)


def put(f, place, value):
    del f[place]
    f[place] = value


def elsewhere(shape):
    layout = h5py.VirtualLayout(shape, "f4")
    layout[...] = h5py.VirtualSource("b.h5", "x", shape)
    return layout


KERAS_FAULTS = {
    "soft link": lambda f, place, a: f.__setitem__(place, h5py.SoftLink("/elsewhere")),
    "external link": lambda f, place, a: f.__setitem__(place, h5py.ExternalLink("b.h5", "/x")),
    "external bytes": lambda f, place, a: f.create_dataset(
        place, a.shape, "f4", external=[("/dev/zero", 0, h5py.h5f.UNLIMITED)]
    ),
    "virtual": lambda f, place, a: f.create_virtual_dataset(place, elsewhere(a.shape)),
    "bomb": lambda f, place, a: f.create_dataset(
        place, (1 << 20, 1 << 20), "f4", chunks=(1024, 1024), compression="gzip"
    ),
    "packed": lambda f, place, a: f.create_dataset(
        place, data=a, chunks=a.shape, compression="gzip"
    ),
    "never written": lambda f, place, a: f.create_dataset(place, (1 << 20, 1 << 20), "f4"),
    "text": lambda f, place, a: f.create_dataset(place, data="kernel"),
    "same name": lambda f, place, a: [
        f.create_dataset(p, data=a) for p in (place, "x/conv2d/kernel:0")
    ],
    "integers": lambda f, place, a: f.create_dataset(place, data=a.astype("i4")),
    "turned": lambda f, place, a: f.create_dataset(place, data=a.T),
    "group": lambda f, place, a: f.create_group(place),
    "nothing": lambda f, place, a: f.create_dataset(place, data=h5py.Empty("f4")),
}


@pytest.mark.parametrize("fault", KERAS_FAULTS)
def test_keras_files(tmp_path, fault):
    path = tmp_path / "a.h5"
    as_keras(path)
    with h5py.File(path, "a") as f:
        replace(f, KERAS_FAULTS[fault])
    attempt(path, refused=False)
    attempt(path)


def odd_type(f, place, array):
    h5py.h5d.create(f.id, place.encode(), h5py.h5t.UNIX_D32LE, h5py.h5s.create(h5py.h5s.SCALAR))


CHECKPOINT_FAULTS = {
    **{name: (KERAS_FAULTS[name], "not plain data") for name in ("external bytes", "virtual")},
    **{name: (KERAS_FAULTS[name], "not plain data") for name in ("never written", "nothing")},
    "no state": (lambda f, place, a: f.pop("state"), "not a readable checkpoint"),
    "state of text": (lambda f, place, a: put(f, "state", "{}"), "not a readable checkpoint"),
    "no JSON": (lambda f, place, a: put(f, "state", np.uint8([9])), "not a readable checkpoint"),
    "odd type": (odd_type, "not a readable checkpoint"),
}


@pytest.mark.parametrize("fault", CHECKPOINT_FAULTS)
def test_forged_checkpoints(tmp_path, fault):
    """Their first line is right."""
    path = tmp_path / "a.h5"
    checkpoint.save(path, {"conv2d/conv2d/kernel:0": STATE["conv1.weight"]}, {})
    change, said = CHECKPOINT_FAULTS[fault]
    with h5py.File(path, "a") as f:
        replace(f, change)
    content = path.read_bytes()[checkpoint.BLOCK :]
    path.write_bytes(checkpoint.first_line(hashlib.sha256(content).hexdigest()) + content)
    assert said in attempt(path)


def edit(**fields):
    """An edit of the kernel's entry: other values for fields, named by number."""

    def change(entries):
        key = b"base_model/conv2d/kernel"
        kept = {"f1": (1, 1), "f4": (4, 0), "f5": (5, 216)}
        shape = message(*((2, message((1, n))) for n in (3, 3, 3, 2)))
        raw = np.ascontiguousarray(STATE["conv1.weight"].transpose(2, 3, 1, 0)).tobytes()
        kept |= {"f2": (2, shape), "f6": (6, masked_crc32c(raw))} | fields
        entries[key] = message(*kept.values())

    return change


def long_names(entries):
    for i in range(3):
        entries[b"x" * 1500 + bytes([i])] = b""


BUNDLE_FAULTS = {
    "little-endian": {"header": ((1, 1), (2, 1))},
    "compressed": {"kind": 1},
    "slices": {"change": edit(f7=(7, b""))},
    "is of type other": {"change": edit(f1=(1, 7))},  # text
    "in slices, or its size": {"change": edit(f5=(5, 215))},
    "or its size or CRC-32C": {"change": edit(f6=(6, 1))},
    "name that is too long": {"change": long_names},
    "data-00005-of-00012: No such": {"header": ((1, 12), (2, 0)), "change": edit(f3=(3, 5))},
    "impossible shape": {"change": edit(f2=(2, message((2, message((1, 1 << 63))))))},
    "fields of type 3": {"change": lambda e: e.update({b"x": b"\x0b"})},
    "1 missing": {"change": lambda e: e.pop(b"base_model/batch_normalization/beta")},
    "KeyError": {"change": lambda e: e.pop(b"")},
}


@pytest.mark.parametrize("expected", BUNDLE_FAULTS)
def test_tensorflow_files(tmp_path, expected):
    import re

    path = tmp_path / "a.index"
    bundle(path, edit())
    attempt(path, refused=False)
    bundle(path, **BUNDLE_FAULTS[expected])
    assert re.search(expected, attempt(path).removeprefix(str(path)))


def test_averages_that_an_optimizer_keeps_are_passed_over(tmp_path):
    def averaged(entries):
        kernel = b"base_model/conv2d/kernel"
        entries[kernel + b"/ExponentialMovingAverage"] = entries[kernel]

    bundle(tmp_path / "a.index", averaged)
    assert attempt(tmp_path / "a.index", refused=False) is None


def test_arrays_that_the_network_has_no_place_for_are_told(tmp_path):
    as_keras(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as f:
        f["conv2d_1/conv2d_1/bias:0"] = np.zeros(2, "f4")
    assert "1 unexpected (conv2d_1/bias)" in attempt(tmp_path / "a.h5")
    bundle(tmp_path / "a.index", lambda e: e.update({b"base_model/x": [*e.values()][-1]}))
    assert "1 unexpected (base_model/x)" in attempt(tmp_path / "a.index")


def test_small_whole_numbers_of_pth(tmp_path):
    torch = pytest.importorskip("torch")
    small = {"a": torch.tensor([-1], dtype=torch.int8), "b": torch.tensor([200], dtype=torch.uint8),
             "c": torch.tensor([-300], dtype=torch.int16),
             "d": torch.tensor([70_000], dtype=torch.int32)}  # fmt: skip
    torch.save(small, tmp_path / "a.pth")
    stored = weights.read(tmp_path / "a.pth")
    assert [stored.fetch(name).tolist() for name in "abcd"] == [[-1], [200], [-300], [70_000]]


def test_numbers_beside_the_tensors_may_be_large():
    tree = {"seed": 1 << 40, "negative": -(1 << 63), "lr": 0.1, "epoch": 70_000, "best": None}
    kept = [value for value in tree.values() if value is not None]
    assert [*unpickle(pickle.dumps(tree, 2)).values()] == [*kept, None]


def test_a_text_may_be_remembered_after_many_others():
    tree = {f"k{i}": f"v{i}" for i in range(300)}
    tree |= {"a": tree["k299"], "b": tree["k299"]}
    assert unpickle(pickle.dumps(tree, 2)) == tree


@pytest.mark.parametrize("name, code", [("float16", 19), ("float64", 2), ("bfloat16", 14)])
def test_tensorflow_s_other_floats(tmp_path, name, code):
    kernel = np.ascontiguousarray(STATE["conv1.weight"].transpose(2, 3, 1, 0))
    if name == "bfloat16":
        raw = (kernel.view("<u4") >> 16).astype("<u2").tobytes()  # its upper half
    else:
        raw = kernel.astype(name).tobytes()
    path, crc = tmp_path / "a.index", masked_crc32c(raw)
    bundle(path, edit(f1=(1, code), f4=(4, 0), f5=(5, len(raw)), f6=(6, crc)))
    path.with_name("a.data-00000-of-00001").write_bytes(raw)
    found = weights.read(path).fetch("base_model/conv2d/kernel")
    np.testing.assert_allclose(found, kernel, rtol=2**-7 if name == "bfloat16" else 2**-10)


def test_a_negative_variance_is_refused_by_any_name(tmp_path):
    path = tmp_path / "a.h5"
    as_keras(path)
    for variance in (0, -1):  # 0: of a channel that never changes
        with h5py.File(path, "a") as f:
            f["batch_normalization/batch_normalization/moving_variance:0"][0] = variance
        said = attempt(path, refused=variance < 0)
        assert "or a negative variance" in said if variance < 0 else said is None


def test_no_weights_at_all(tmp_path):
    for content in (b"", b"x", b"\0" * 100, b"<html>not found</html>" * 10, MAGIC, b"PK\x03\x04"):
        (tmp_path / "a").write_bytes(content)
        attempt(tmp_path / "a")
    attempt(tmp_path / "absent")
    attempt(tmp_path)
