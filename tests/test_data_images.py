"""Every kind of picture becomes upright RGB in a defined way; junk and bombs are refused."""

import io
import struct
import warnings
import zlib
from contextlib import nullcontext, suppress

import numpy as np
import pytest
from PIL import Image, ImageFont, TiffImagePlugin

from minisimclr.data.images import contact_sheet, decode, decode_file, font_for
from minisimclr.errors import DataError

RAMP = np.add.outer(np.arange(24) * 5, np.arange(24) * 3).astype(np.uint8)  # (24, 24)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_a_damaged_exif_header_turns_nothing():
    for kind in ("JPEG", "PNG", "WEBP"):
        plain = decode(encode(Image.fromarray(RAMP), kind), 24)
        damaged = encode(Image.fromarray(RAMP), kind, exif=b"Exif\0\0garbage, and no TIFF")
        np.testing.assert_array_equal(decode(damaged, 24), plain)


def tiff(bits: int, row: bytes, white: int = 1) -> bytes:
    """24 x 24 px of grey, each row the same; in some files white is 0."""
    tags = [(256, 24), (257, 24), (258, bits), (259, 1), (262, white), (273, 122), (277, 1)]
    tags += [(278, 24), (279, 24 * len(row))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack("<2sHIH", b"II", 42, 8, 9) + entries + bytes(4) + 24 * row


@pytest.mark.parametrize("bits, row", [(8, "ff" * 24), (16, "ffff" * 24)])
def test_white_may_be_0_in_tiff(bits, row):
    assert decode(tiff(bits, bytes.fromhex(row)), 24).min() == 255
    assert decode(tiff(bits, bytes.fromhex(row), white=0), 24).max() == 0


def test_what_grey_of_16_bits_calls_transparent_is_white():
    levels = np.full((24, 24), 9 * 256, np.uint16)
    levels[:, 12:] += 1  # as dark in 8 bits, but not the level that the file names
    content, key = encode(Image.fromarray(levels)), b"tRNS" + struct.pack(">H", 9 * 256)
    clear = struct.pack(">I", 2) + key + struct.pack(">I", zlib.crc32(key))
    pixels = decode(content[:33] + clear + content[33:], 24)  # after the header
    assert (pixels[:, :12] == 255).all() and (pixels[:, 12:] == 9).all()


def test_grey_of_12_bits_is_as_bright_as_of_16():
    twelve = decode(tiff(12, bytes.fromhex("fff800" * 12)), 24)  # white, then grey
    sixteen = decode(tiff(16, bytes.fromhex("ffff0080" * 12)), 24)
    assert twelve.max() == 255 and 120 < twelve[:, 1].mean() < 140
    np.testing.assert_array_equal(twelve, sixteen)


def deep_tiff(bits: tuple[int, ...], **tags: int | tuple[int, ...]) -> bytes:
    """24 x 24 px, uncompressed, each colour in a plane of its own."""
    places = tuple(24 * 24 * 2 * plane for plane in range(len(bits)))
    directory = TiffImagePlugin.ImageFileDirectory_v2()  # counts places from its own end
    known = {256: 24, 257: 24, 258: bits, 259: 1, 262: 2 if len(bits) > 1 else 1, 273: places}
    known |= {277: len(bits), 278: 24, 279: (24 * 24 * 2,) * len(bits)}
    known |= {int(tag.strip("_")): value for tag, value in tags.items()}
    for tag, value in known.items():
        directory[tag] = value
    planes = len(bits) * (RAMP.astype("<u2") * 257).tobytes()
    return struct.pack("<2sHI", b"II", 42, 8) + directory.tobytes(8) + planes


def test_planes_of_16_bits_are_not_misread():
    """Pillow takes each byte of an uncompressed one for a pixel, and says nothing."""
    np.testing.assert_array_equal(decode(deep_tiff((16,)), 24), grey(RAMP))
    with pytest.raises(DataError, match="uncompressed planes of 16 bits: save it with 8"):
        decode(deep_tiff((16, 16, 16), _284=2), 24)


@pytest.mark.parametrize("bits", [8, 16])
def test_numbers_with_a_sign_are_refused(bits):
    """Of 16 bits, they were said to have 32; of 8, -1 was white."""
    with pytest.raises(DataError, match="32 bits or signed ones: save it unsigned"):
        decode(deep_tiff((bits,), _339=2), 24)


def test_a_tiff_that_pillow_cannot_read_is_not_called_none():
    with pytest.raises(DataError, match=r"none of JPEG, .* that Pillow can read"):
        decode(deep_tiff((16, 16, 16, 16, 16), _338=(0, 0)), 24)


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b""))
        + (chunk(b"IEND", b""))
    )


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def half_transparent() -> Image.Image:
    image = Image.fromarray(grey(RAMP)).convert("RGBA")
    alpha = np.where(np.arange(24) < 12, 0, 255).astype(np.uint8)
    image.putalpha(Image.fromarray(np.tile(alpha, (24, 1))))
    return image


def palette(**options) -> bytes:
    image = Image.new("P", (24, 24), 1)
    image.putpalette([0, 0, 0, 200, 100, 50] + [0] * 762)
    return encode(image, **options)


def animation() -> bytes:
    frames = [Image.fromarray(RAMP), Image.new("L", (24, 24), 255)]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:])


DEEP = RAMP.astype(np.uint16) * 256 + 77
WHITE_LEFT = grey(np.where(np.arange(24) < 12, 255, RAMP).astype(np.uint8))
COLOUR = np.broadcast_to(np.array([200, 100, 50], np.uint8), (24, 24, 3))
WHITE = np.full((24, 24, 3), 255, np.uint8)
MODES = {
    "RGB": (encode(Image.fromarray(grey(RAMP))), grey(RAMP)),
    "grey": (encode(Image.fromarray(RAMP)), grey(RAMP)),
    "bilevel": (encode(Image.new("1", (24, 24), 1)), WHITE),
    "grey, 16 bit": (encode(Image.fromarray(DEEP)), grey(RAMP)),
    "grey, 16 bit, PGM": (b"P5 24 24 65535\n" + DEEP.astype(">u2").tobytes(), grey(RAMP)),
    "grey, 16 bit, TIFF": (encode(Image.fromarray(DEEP), "TIFF"), grey(RAMP)),
    "BMP": (encode(Image.fromarray(grey(RAMP)), "BMP"), grey(RAMP)),
    "alpha": (encode(half_transparent()), WHITE_LEFT),
    "alpha, WebP": (encode(half_transparent(), "WEBP", lossless=True), WHITE_LEFT),
    "grey and alpha": (encode(half_transparent().convert("LA")), WHITE_LEFT),
    "palette": (palette(), COLOUR),
    "palette with a clear colour": (palette(transparency=1), WHITE),
    "GIF": (palette(kind="GIF"), COLOUR),
    "GIF with a clear colour": (palette(kind="GIF", transparency=1), WHITE),
    "GIF with two frames": (animation(), grey(RAMP)),
    "grey with a clear value": (encode(Image.new("L", (24, 24), 9), transparency=9), WHITE),
    "CMYK": (
        encode(Image.new("CMYK", (24, 24), (0, 255, 255, 0)), "JPEG", quality=100),
        np.broadcast_to(np.array([254, 0, 0], np.uint8), (24, 24, 3)),
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode):
    content, expected = MODES[mode]
    tolerance = 2 if mode == "CMYK" else 0
    np.testing.assert_allclose(
        decode(content, 24).astype(int), expected.astype(int), atol=tolerance
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "PNG with alpha", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright(orientation, kind):
    """A picture stored turned or mirrored, with the tag that says so, comes out as it was."""
    upright = np.zeros((48, 60, 3), np.uint8)
    upright[:24, :30] = 255, 0, 0
    upright[:24, 30:] = 0, 255, 0
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    image = Image.fromarray(np.ascontiguousarray(stored))
    image = image.convert("RGBA") if "alpha" in kind else image
    content = encode(image, kind.split()[0], exif=exif, **options)
    for size in (12, 48):  # with and without a JPEG draft
        corner = size // 4
        small = decode(content, size)
        assert small[corner, corner, 0] > 200 > 60 > small[corner, corner, 1]
        assert small[corner, -corner, 1] > 200 > 60 > small[corner, -corner, 0]
        assert small[-corner].max() < 60


def test_centre_square_with_pillows_filter():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    image = Image.fromarray(pixels)
    expected = image.crop((10, 0, 40, 30)).resize((20, 20), Image.Resampling.BICUBIC)
    inner = np.s_[2:-2, 2:-2]  # at the edges, the filter also sees what the crop took away
    np.testing.assert_array_equal(decode(encode(image), 20)[inner], np.asarray(expected)[inner])


@pytest.mark.parametrize(
    ("box", "square"),
    [
        ((10, 8, 20, 14), (10, 6, 20, 16)),  # grown to a square about its centre
        ((0, 0, 6, 16), (0, 0, 16, 16)),  # pushed back inside
        ((10, 0, 30, 6), (10, 0, 30, 20)),
        ((44, 20, 50, 30), (40, 20, 50, 30)),
        ((0, 0, 50, 30), (10, 0, 40, 30)),  # cut down to what fits
        ((40, 25, 99, 99), (20, 0, 50, 30)),  # beyond the edge
    ],
)
def test_square_around_a_box(box, square):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8))
    side = square[2] - square[0]
    expected = np.asarray(image.crop(square))
    np.testing.assert_array_equal(decode(encode(image), side, (*box, 50, 30)), expected)


def test_a_box_is_of_the_picture_as_stored():
    """Before its tag turns it upright, and before a JPEG is decoded at half its size."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    found = decode(encode(image, exif=exif), 10, (10, 8, 20, 18, 50, 30))
    np.testing.assert_array_equal(found, np.rot90(np.asarray(image.crop((10, 8, 20, 18))), -1))
    image = Image.new("RGB", (256, 192))
    image.paste("white", (144, 112, 240, 192))
    found = decode(encode(image, "JPEG"), 16, (160, 128, 224, 192, 256, 192))
    assert found.min() > 250


def test_a_small_box_keeps_its_detail():
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    content = encode(Image.fromarray(noise), "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(content)))[90:120, 200:230]
    found = decode(content, 30, (200, 90, 230, 120, 400, 300))
    np.testing.assert_array_equal(found, expected)


def test_box_of_another_picture_is_refused():
    with pytest.raises(DataError, match="24 x 24 pixels, its annotation says 25 x 24"):
        decode(MODES["RGB"][0], 12, (0, 0, 10, 10, 25, 24))


def test_draft_changes_little(test_data):
    """Decoding real photos at a half or a quarter moves pixels by about 1 of 255."""
    changes = []
    for path in sorted(test_data.glob("dog-photos/*/*.jpg"))[::4]:
        image = Image.open(path).convert("RGB")
        w, h = image.size
        side = min(w, h)
        box = ((w - side) / 2, (h - side) / 2, (w + side) / 2, (h + side) / 2)
        full = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC, box)).astype(int)
        changes.append(np.abs(decode_file(path, 64) - full).mean())
    assert 0 < np.mean(changes) < 1.5


@pytest.mark.parametrize(
    "width, height, px", [(641, 961, 40), (809, 1601, 40), (1201, 807, 40), (97, 97, 8)]
)
def test_a_draft_whose_last_pixel_is_not_whole_is_cropped_as_the_original(width, height, px):
    soft = 3 * px // 10, 9 * px // 20, 3
    colours = np.random.default_rng(0).integers(0, 256, soft, dtype=np.uint8)
    image = Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)
    image.save(buffer := io.BytesIO(), "JPEG", quality=97, subsampling=0)
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = left, top, left + side, top + side
    whole = np.asarray(image.resize((px, px), Image.Resampling.BICUBIC, box)).astype(int)
    assert abs(decode(buffer.getvalue(), px) - whole).mean() < 1  # 4 to 10 with a crop that is off


def test_a_draft_keeps_one_and_a_half_times_the_side():
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    content = encode(Image.fromarray(noise), "JPEG")
    for size, drafted in (33, False), (32, True):
        image = Image.open(io.BytesIO(content)).resize((size, size), Image.Resampling.BICUBIC)
        assert np.array_equal(decode(content, size), np.asarray(image)) != drafted


NOISE = encode(
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "JPEG"
)
BAD = {
    "empty": (b"", "cannot be decoded"),
    "text": (b"no picture at all", r"cannot be decoded \(none of JPEG, PNG"),
    "HTML": (b"<!doctype html><title>404</title>", "cannot be decoded"),
    "truncated by half": (NOISE[: len(NOISE) // 2], "truncated"),
    "truncated by a little": (NOISE[:-40], "truncated"),
    "TGA": (encode(Image.new("L", (24, 24)), "TGA"), "cannot be decoded"),
    "32 bits": (encode(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "32 bits"),
    "floats": (encode(Image.fromarray(RAMP / np.float32(255)), "TIFF"), "32 bits"),
    "1 x 1": (encode(Image.new("RGB", (1, 1))), "1 x 1 pixels"),
    "sliver": (encode(Image.new("RGB", (2000, 30)), "JPEG"), "neither more than 20 times"),
    "0 x 0": (png_header(0, 0), "0 x 0|cannot be decoded"),
    "60 megapixels": (png_header(10_000, 6_000), "more than 51 million"),
    "144 megapixels": (png_header(12_000, 12_000), "more than 51 million"),
    "50 megapixels": (png_header(8_688, 5_792), "cannot be decoded"),  # not too many
    "400 megapixels": (png_header(20_000, 20_000), "bomb"),
    "no pixels": (png_header(24, 24), "cannot be decoded"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_pictures_are_refused(kind):
    content, reason = BAD[kind]
    with pytest.raises(DataError, match=reason):
        decode(content, 24)


def test_a_narrow_picture_is_still_one():
    assert decode(encode(Image.new("RGB", (8, 160))), 24).shape == (24, 24, 3)
    for speck in (7, 24), (8, 161):
        with pytest.raises(DataError, match="both sides must have 8"):
            decode(encode(Image.new("RGB", speck)), 24)


@pytest.mark.parametrize("size", [(101, 100), (100, 101)])
def test_a_jpeg_of_odd_sides_may_be_decoded_smaller(size):
    assert decode(encode(Image.new("RGB", size), "JPEG"), 32).shape == (32, 32, 3)


def test_a_clear_palette_is_white():
    image = Image.new("PA", (24, 24))
    image.putpalette([200, 100, 50] * 256)
    assert (decode(encode(image, "TIFF"), 24) == 255).all()


def test_any_damage_is_decoded_or_refused():
    rng = np.random.default_rng(0)
    kinds = ["alpha", "alpha, WebP", "palette", "BMP", "GIF with two frames"]
    kinds += ["grey, 16 bit, PGM", "grey, 16 bit, TIFF"]
    for content in (NOISE, *(MODES[kind][0] for kind in kinds)):
        for _ in range(60):
            damaged = bytearray(content)
            for position in rng.integers(0, len(content), 4):
                damaged[position] = rng.integers(256)
            with suppress(DataError):
                assert decode(bytes(damaged), 8).shape == (8, 8, 3)


def test_no_warning_leaves():
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\xff\xff\0\0"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(encode(Image.new("RGB", (24, 24)), "JPEG", exif=exif), 8)


def test_file_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"cannot be read \(No such file"):
        decode_file(tmp_path / "none", 8)
    monkeypatch.setattr("minisimclr.data.images.MAX_BYTES", 1 << 20)
    for size in (0, 1):
        (tmp_path / "file").write_bytes(NOISE.ljust((1 << 20) + size, b"\0"))
        with pytest.raises(DataError, match="has more than 1 MiB") if size else nullcontext():
            decode_file(tmp_path / "file", 8)


def test_captions_beyond_ascii_take_a_font_of_the_system(monkeypatch):
    assert font_for("beagle") is None
    monkeypatch.setattr("minisimclr.data.images.FONTS", ("no such font.ttf",))
    assert font_for("Łódź") is None
    font, real = ImageFont.load_default(10), ImageFont.truetype
    tried = []

    def truetype(name, size, **how):
        if not isinstance(name, str):
            return real(name, size, **how)  # Pillow's own
        tried.append(name)
        assert size == 10  # as Pillow's own
        if name == "none.ttf":
            raise OSError("cannot open resource")
        return font

    monkeypatch.setattr(ImageFont, "truetype", truetype)
    monkeypatch.setattr("minisimclr.data.images.FONTS", ("none.ttf", "some.ttf", "more.ttf"))
    assert font_for("Łódź") is font and tried == ["none.ttf", "some.ttf"]
    images = np.zeros((1, 20, 20, 3), np.uint8)
    contact_sheet([("柴犬", images), ("a", images)])
    assert tried == ["none.ttf", "some.ttf"] * 2


def test_a_contact_sheet_blurs_nothing():
    checks = np.indices((20, 20)).sum(0)[None, ..., None] % 2 * np.full(3, 255, np.uint8)
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet([("a", checks.astype(np.uint8))]))))
    assert set(np.unique(sheet[:, 150:])) == {0, 255}


def test_contact_sheet():
    images = np.full((3, 20, 20, 3), 77, np.uint8)
    sheet = Image.open(io.BytesIO(contact_sheet([("a", images[:2]), ("b", images)])))
    assert sheet.size == (150 + 3 * 80, 2 * 80)  # four times as large
    assert sheet.getpixel((150 + 2 * 80, 79)) == (255, 255, 255)
    assert sheet.getpixel((150 + 2 * 80, 80)) == (77, 77, 77)
    captions = np.asarray(sheet)[:, :150].reshape(2, 80, 150, 3)
    assert (captions.min(axis=(1, 2, 3)) < 50).all() and (captions[0] != captions[1]).any()
