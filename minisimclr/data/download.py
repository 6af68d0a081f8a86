"""Download a file, resuming broken attempts; put it in place only when it is whole and right.

What has arrived waits in a hidden file beside the final one, along with the server's mark for this
version of the file (ETag or date), so that the next attempt or run asks only for the rest.
"""

import ssl
import time
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from ..errors import ConfigError, DataError
from ..files import file_sha256, locked, rename, sync
from .source import Progress

ATTEMPTS = 4
BACK_OFF = 1.0  # seconds before the second attempt, doubled before each one after it
TIMEOUT = 30.0  # seconds of silence
SLOWEST = 5_000  # bytes per second on average, once TIMEOUT has passed
BROKEN = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError, ValueError)


def download(
    url: str, path: Path, size: int, sha256: str | None, progress: Progress | None = None
) -> None:
    """Fetch `url` to `path`: `size` bytes with this SHA-256; if that is None, at most `size` bytes.

    A right file that is already there is kept. Raises ConfigError for a `url` that is not http or
    https, DataError if the server does not deliver it, OSError if the disk cannot take it.
    """
    if not url.lower().startswith(("http:", "https:")):
        raise ConfigError(f"{url}: is not an http or https address")
    path.parent.mkdir(parents=True, exist_ok=True)
    part, mark = (path.with_name(f".{path.name}.{kind}") for kind in ("part", "mark"))
    with locked(path):
        if path.exists() and (not sha256 or sha256 == file_sha256(path)):
            return
        for attempt in range(ATTEMPTS):
            try:
                fetch(url, part, mark, size, progress)
                break
            except BROKEN as error:
                refused = isinstance(error, HTTPError) and error.code < 500 and error.code != 416
                if refused or attempt == ATTEMPTS - 1:
                    reason = " ".join(str(error).split())
                    raise DataError(
                        f"{url}: {reason}: fetch {path.name} in another way and name it with "
                        f"--{path.stem}-tar"
                    ) from error
                time.sleep(BACK_OFF * 2**attempt)
            except OSError as error:  # of a full disk it does not say where
                error.filename = error.filename or str(part)
                raise
        if sha256 and sha256 != file_sha256(part):
            had = part.stat().st_size
            part.unlink()
            raise DataError(f"{url}: the {had:,} bytes there do not have the SHA-256 {sha256}")
        sync(part)
        rename(part, path)
        mark.unlink(missing_ok=True)
        sync(path.parent)


def fetch(url: str, part: Path, mark: Path, size: int, progress: Progress | None) -> None:
    """Add to `part` what it lacks. Raises one of BROKEN if another attempt may get further."""
    have = part.stat().st_size if part.exists() and mark.exists() else 0
    if have == size:  # all came before; the caller checks it
        return
    headers = {"User-Agent": "minisimclr", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": mark.read_text()}
    try:
        response = build_opener(Redirects).open(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        error.close()  # the error is the response, too
        if error.code == 416:  # the server's file does not continue ours
            part.unlink(missing_ok=True)
        raise
    with response, part.open("ab") as file:
        span = response.headers["Content-Range"] or ""  # bytes FIRST-LAST/WHOLE
        if response.status != 206 or not span.startswith(f"bytes {have}-"):
            have = 0  # the whole file comes: new, or not resumable
            file.truncate(0)
            mark.unlink(missing_ok=True)
            if response.status == 206:
                raise ConnectionError("sent another part than was asked for")
            etag = response.headers["ETag"] or "W/"  # a weak one does not vouch for every byte
            if version := response.headers["Last-Modified"] if etag[:2] == "W/" else etag:
                mark.write_text(version)
        length = response.headers["Content-Length"]
        whole = span.rpartition("/")[2] if have else ""  # an answer may hold less than all the rest
        total = int(whole) if whole.isdecimal() else have + int(length) if length else size
        if total > size:
            raise DataError(f"{url}: offers {total:,} bytes where {size:,} are expected")
        began, had = time.monotonic(), have
        while block := response.read1(1 << 16):
            have += len(block)
            if have > total:
                raise DataError(f"{url}: does not end after {total:,} bytes")
            if have - had < SLOWEST * (time.monotonic() - began - TIMEOUT):
                raise TimeoutError(f"less than {SLOWEST} bytes per second")
            file.write(block)
            if progress:
                progress(have, total)
    if (length or whole.isdecimal()) and have < total:
        raise ConnectionError(f"closed after {have:,} of {total:,} bytes")


class Redirects(HTTPRedirectHandler):
    """Follows a few redirects between web addresses, but none back from https to http."""

    max_redirections = 5

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        old, new = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if new not in ("http", "https") or (old, new) == ("https", "http"):
            raise DataError(f"{req.full_url}: redirects to {newurl}, which is refused")
        return super().redirect_request(req, fp, code, msg, headers, newurl)
