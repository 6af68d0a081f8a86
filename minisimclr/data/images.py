"""From the bytes of a picture's file to one square of RGB pixels, or a reason why not.

The picture is turned upright (EXIF), cropped to a square and resized with Pillow's antialiased
bicubic filter. Transparency is laid on white, grey of 12 or 16 bits keeps its 8 highest, CMYK and
palettes become RGB, and only the first frame of an animation counts. Damage inside a JPEG's scan
usually decodes without an error, so only an archive's checksum proves that the pixels are the
originals.
"""

import io
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from ..errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
SUFFIXES = (".jpg", ".jfif", ".tif", ".pgm", *(f".{name.lower()}" for name in FORMATS))
FILTER = "bicubic, JPEG draft at a whole scale down to 1.5 times the side"
MAX_BYTES, MAX_PIXELS = 64 << 20, 51_000_000  # 50-megapixel cameras have up to 8,688 x 5,792
MIN_SIDE, MAX_ASPECT = 8, 20
DRAFT_GAP = 1.5  # JPEGs are decoded at 1/2, 1/4 or 1/8 while that leaves 1.5 times the wanted side
# Tags of TIFF: BitsPerSample, Compression, PhotometricInterpretation and so on.
BITS, COMPRESSION, PHOTOMETRIC, PLANAR, SAMPLE_FORMAT = 258, 259, 262, 284, 339
CAPTION, SHOWN = 150, 80  # px of a contact sheet; a picture there has at least so many
# Of macOS, Linux and Windows, those of most scripts first.
FONTS = ("Arial Unicode.ttf", "NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "msyh.ttc", "arial.ttf")

# x0, y0, x1, y1 in pixels, then the width and height of the picture they belong to.
Box = tuple[int, int, int, int, int, int]


def decode(content: bytes, size: int, box: Box | None = None) -> np.ndarray:
    """The picture in `content` as uint8 (size, size, 3): its centre, or the square around `box`.

    Raises DataError for anything but a decodable picture of reasonable size.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # about metadata that nobody needs
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            check_dimensions(*image.size, box)
            x, y, side = square(*image.size, box)
            gain, full_width = max(1.0, side / (DRAFT_GAP * size)), image.width
            if gain > 1:
                image.draft(None, (int(image.width / gain), int(image.height / gain)))
            scale = -(-full_width // image.width)  # 1, 2, 4 or 8: a draft's sides are rounded up
            x, y, side = (v / scale for v in (x, y, side))
            bounds = (x, y, min(x + side, image.width), min(y + side, image.height))
            small = to_rgb(image).resize((size, size), Image.Resampling.BICUBIC, bounds)
            small.info = image.info  # boxes refer to the picture as stored, so turning is last
            with suppress(Exception):  # of a damaged header, as Pillow's parsers stumble
                ImageOps.exif_transpose(small, in_place=True)
            return np.asarray(small)
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        kinds = ", ".join(FORMATS)
        raise DataError(f"cannot be decoded (none of {kinds} that Pillow can read)") from error
    except Exception as error:  # on junk, Pillow raises whatever its parsers stumble over
        raise DataError(f"cannot be decoded ({str(error) or type(error).__name__})") from error


def decode_file(path: Path, size: int) -> np.ndarray:
    """`decode` what a file holds. Raises DataError also if it cannot be read."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})") from error
    if len(content) > MAX_BYTES:
        raise DataError(f"has more than {MAX_BYTES >> 20} MiB")
    return decode(content, size)


def check_dimensions(width: int, height: int, box: Box | None) -> None:
    """Raise DataError for bombs, specks and slivers, and for a box that is not of this picture."""
    if width * height > MAX_PIXELS:
        raise DataError(f"has {width} x {height} pixels, more than {MAX_PIXELS // 10**6} million")
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
        said = f"has {width} x {height} pixels: both sides must have {MIN_SIDE}"
        raise DataError(f"{said} and neither more than {MAX_ASPECT} times the other")
    if box and box[4:] != (width, height):
        raise DataError(f"has {width} x {height} pixels, its annotation says {box[4]} x {box[5]}")


def square(width: int, height: int, box: Box | None) -> tuple[float, float, float]:
    """Left, top and side of the smallest square around `box` that fits into the picture."""
    x0, y0, x1, y1 = box[:4] if box else (0, 0, width, height)
    side = min(max(x1 - x0, y1 - y0), width, height)
    left = min(max((x0 + x1 - side) / 2, 0), width - side)
    top = min(max((y0 + y1 - side) / 2, 0), height - side)
    return left, top, side


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode that FORMATS can hold to RGB."""
    tags = getattr(image, "tag_v2", {})  # of TIFF, whose raw planes of 16 bits Pillow misreads
    if tags and (image.mode in ("I", "F") or 2 in tags.get(SAMPLE_FORMAT, ())):  # no known white
        raise DataError("has pixels of 32 bits or signed ones: save it unsigned, with 8 or 16")
    if tags.get(PLANAR) == 2 and 16 in tags.get(BITS, ()) and tags.get(COMPRESSION, 1) == 1:
        raise DataError("has uncompressed planes of 16 bits: save it with 8, or compressed")
    if image.mode.startswith("I"):  # grey of 16 bits; in TIFF perhaps of 12, or with 0 as white
        levels = np.asarray(image)
        grey = (levels >> tags.get(BITS, (16,))[0] - 8).astype(np.uint8)
        grey = grey if tags.get(PHOTOMETRIC) != 0 else 255 - grey
        grey[levels == image.info.get("transparency", -1)] = 255
        image = Image.fromarray(grey)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def font_for(caption: str) -> ImageFont.FreeTypeFont | None:
    """One of the system's fonts for letters beyond ASCII, which Pillow's own lacks; None for that,
    and where the system has none of these.
    """
    for name in () if caption.isascii() else FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, 10)
    return None


def contact_sheet(rows: list[tuple[str, np.ndarray]]) -> bytes:
    """A PNG with one row of pictures, uint8 (n, S, S, 3), beside each caption. Small ones are shown
    in whole multiples of their size.
    """
    times = -(-SHOWN // rows[0][1].shape[1])
    side = times * rows[0][1].shape[1]
    columns = max(len(images) for _, images in rows)
    sheet = Image.new("RGB", (CAPTION + columns * side, len(rows) * side), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (caption, images) in enumerate(rows):
        draw.text((4, y * side + side // 2 - 6), caption, "black", font_for(caption))
        for x, image in enumerate(images):
            shown = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(shown, (CAPTION + x * side, y * side))
    sheet.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()
