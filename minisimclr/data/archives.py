"""Read tar archives as a stream, member by member: nothing is ever written to disk.

That leaves no path to escape by and no link to follow. The rest is refused with an error that names
it: links and devices; members too large, too many or duplicated; headers that promise too much.
`tarfile` stops silently at some kinds of damage, so the caller counts what it got.
"""

import bz2
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from posixpath import normpath
from typing import Any, BinaryIO

from ..errors import DataError

MAX_MEMBERS = 200_000  # tarfile keeps the header of each
MAX_MEMBER_BYTES = 64 << 20  # with its headers and padding
# How to open an archive that begins with these two bytes.
OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the regular files in a plain or compressed tar file.

    Raises DataError if the archive cannot be read or holds what no data set needs.
    """
    seen: set[str] = set()
    try:
        with path.open("rb") as raw:
            opener = OPENERS.get(raw.read(2))
            raw.seek(0)
            stream: Any = Metered(opener(raw) if opener else raw)
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    name = normpath(member.name)
                    check(member, name)
                    if name in seen:
                        raise DataError(f"has {member.name!r} twice")
                    if len(seen) == MAX_MEMBERS:
                        raise DataError(f"has more than {MAX_MEMBERS:,} members")
                    seen.add(name)
                    if member.isreg():
                        content = archive.fileobj.read(member.size)  # extractfile takes longer
                        if len(content) < member.size:
                            raise DataError(f"ends within {member.name!r}")
                        yield name, content
                    stream.left = MAX_MEMBER_BYTES
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    # On damage, tarfile and the decompressors raise whatever they stumble over.
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be read as a tar archive ({error})") from error


def check(member: tarfile.TarInfo, name: str) -> None:
    """Raise DataError for a member (its path normalised: `name`) that no data set needs."""
    if name.startswith(("/", "../")):
        raise DataError(f"{member.name!r} points out of the archive")
    plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
    if not member.isdir() and not plain:
        raise DataError(f"{member.name!r} is a link, a device or sparse, not a plain file")
    if not 0 <= member.size <= MAX_MEMBER_BYTES:
        raise DataError(f"{member.name!r} has {member.size:,} bytes, more than any picture")


class Metered:
    """A file that refuses to be read for more than MAX_MEMBER_BYTES per member."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.left = MAX_MEMBER_BYTES

    def read(self, size: int) -> bytes:
        content = self.file.read(size)
        self.left -= len(content)
        if self.left < 0:
            raise DataError(f"a member takes more than {MAX_MEMBER_BYTES >> 20} MiB")
        return content
