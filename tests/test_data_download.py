"""Downloads against a server that breaks off, lies, redirects, drips and hangs."""

import errno
import hashlib
import io
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import official_layout as layout
import pytest

from minisimclr import data
from minisimclr.cli import main
from minisimclr.data import Options, open_dataset, prepare, stanford_dogs
from minisimclr.data import download as module
from minisimclr.data.download import Redirects, download
from minisimclr.errors import ConfigError, DataError

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Answers GET /name with `answers[name](handler)`; remembers the headers of each request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.requests = {}, []
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, *_):
        """Clients that hang up are what this is about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests.append(dict(self.headers))
        self.close_connection = True
        self.server.answers[self.path.strip("/")](self)

    def reply(self, code, headers, content=b""):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "BACK_OFF", 0.01)
    monkeypatch.setattr(module, "TIMEOUT", 10)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def whole(content=CONTENT, etag='"v1"', breaks_at=None, ranges=True, mark="ETag", most=None):
    """A server that can resume; with `breaks_at` it closes after so many bytes of an answer. A
    range has `most` bytes.
    """

    def answer(handler):
        headers = {mark: etag} if etag else {}
        wanted = handler.headers.get("Range")
        if ranges and wanted and handler.headers.get("If-Range") in (None, etag):
            begin = int(wanted.removeprefix("bytes=").rstrip("-"))
            if begin >= len(content):
                return handler.reply(416, {"Content-Length": 0})
            end = min(begin + (most or len(content)), len(content))
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
            return handler.reply(
                206, headers | {"Content-Length": end - begin}, content[begin:end][:breaks_at]
            )
        headers["Content-Length"] = len(content)
        part = content[:breaks_at]
        return handler.reply(200, headers, part)

    return answer


def fetch(server, tmp_path, **options):
    path = tmp_path / "images.tar"
    download(server.url + "file", path, len(CONTENT), SHA256, **options)
    return path


def nothing_published(tmp_path):
    return not [p for p in tmp_path.iterdir() if not p.name.startswith(".")]


def test_plain_download(server, tmp_path):
    server.answers["file"] = whole()
    calls = []
    path = fetch(server, tmp_path, progress=lambda *a: calls.append(a))
    assert path.read_bytes() == CONTENT
    assert calls[-1] == (300_000, 300_000)
    fetch(server, tmp_path)
    assert len(server.requests) == 1  # what is there and right is not fetched again
    assert sorted(p.name for p in tmp_path.iterdir()) == [".images.tar.lock", "images.tar"]


def test_an_address_may_be_in_capitals(server, tmp_path):
    server.answers["file"] = whole()
    server.url = server.url.replace("http:", "HTTP:")
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_a_disk_that_cannot_take_it_is_named(server, tmp_path, monkeypatch):
    server.answers["file"] = whole()

    class Full(io.FileIO):
        def write(self, block):
            raise OSError(errno.ENOSPC, "No space left on device")

    once = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda path, mode="r", **more: (Full if mode == "ab" else once)(path, mode, **more),
    )
    with pytest.raises(OSError, match="No space left") as error:
        module.download(server.url + "file", tmp_path / "images.tar", len(CONTENT), None)
    assert error.value.filename == str(tmp_path / ".images.tar.part")


def test_wrong_file_in_place_is_replaced(server, tmp_path):
    (tmp_path / "images.tar").write_bytes(b"half")
    server.answers["file"] = whole()
    assert fetch(server, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("sha256", [SHA256, None])
def test_a_range_may_hold_less_than_was_asked_for(sha256, server, tmp_path):
    server.answers["file"] = whole(breaks_at=120_000, most=100_000)
    download(server.url + "file", path := tmp_path / "images.tar", len(CONTENT), sha256)
    assert path.read_bytes() == CONTENT
    wanted = [request.get("Range") for request in server.requests]
    assert wanted == [None, "bytes=120000-", "bytes=220000-"]


@pytest.mark.parametrize(
    ("mark", "version"), [("ETag", '"v1"'), ("Last-Modified", "Sat, 01 Oct 2011 12:00:00 GMT")]
)
def test_interrupted_download_goes_on(server, tmp_path, mark, version):
    server.answers["file"] = whole(etag=version, mark=mark, breaks_at=120_000)
    told = []
    path = fetch(server, tmp_path, progress=lambda *a: told.append(a))
    assert path.read_bytes() == CONTENT and told == sorted(told)
    first, second, third = server.requests
    assert "Range" not in first
    assert (second["Range"], second["If-Range"]) == ("bytes=120000-", version)
    assert third["Range"] == "bytes=240000-"


def test_content_is_on_the_disk_before_its_name_and_its_name_before_the_end(
    server, tmp_path, monkeypatch
):
    order, rename = [], Path.replace
    monkeypatch.setattr(module, "sync", lambda path: order.append(path.name))
    monkeypatch.setattr(Path, "replace", lambda a, b: order.append("rename") or rename(a, b))
    server.answers["file"] = whole()
    fetch(server, tmp_path)
    assert order == [".images.tar.part", "rename", tmp_path.name]


def test_next_run_goes_on(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ATTEMPTS", 1)
    server.answers["file"] = whole(breaks_at=120_000)
    with pytest.raises(DataError, match=r"closed after 120,000 of 300,000 bytes.*--images-tar"):
        fetch(server, tmp_path)
    assert nothing_published(tmp_path)
    server.answers["file"] = whole()
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.requests[-1]["Range"] == "bytes=120000-"


def test_changed_file_starts_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ATTEMPTS", 1)
    server.answers["file"] = whole(b"x" * 300_000, '"v0"', breaks_at=120_000)
    with pytest.raises(DataError):
        fetch(server, tmp_path)
    server.answers["file"] = whole()
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.requests[-1]["If-Range"] == '"v0"'


def test_a_mark_is_that_of_the_part_beside_it(server, tmp_path):
    old = whole(b"x" * 300_000, '"v0"', breaks_at=120_000)
    answers = iter([old, whole(etag=None, breaks_at=100_000), whole()])
    server.answers["file"] = lambda handler: next(answers)(handler)
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert ["Range" in request for request in server.requests] == [False, True, False]


@pytest.mark.parametrize("options", [{"ranges": False}, {"etag": None}, {"etag": 'W/"v1"'}])
def test_server_that_cannot_resume_starts_again(server, tmp_path, options):
    once = iter([whole(breaks_at=120_000, **options)])
    server.answers["file"] = lambda handler: next(once, whole(**options))(handler)
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert ("Range" in server.requests[-1]) == ("ranges" in options)


def test_range_that_was_not_asked_for_is_not_appended(server, tmp_path):
    once = iter([whole(breaks_at=100_000)])

    def shifted(handler):
        if "Range" not in handler.headers:
            return next(once, whole())(handler)
        headers = {"Content-Range": "bytes 5-200004/300000", "Content-Length": 200_000}
        return handler.reply(206, headers, CONTENT[5:200_005])

    server.answers["file"] = shifted
    assert fetch(server, tmp_path).read_bytes() == CONTENT  # asked for as a whole in the end
    assert ["Range" in asked for asked in server.requests] == [False, True, False]


def test_finished_but_unpublished_part(server, tmp_path):
    """What an interrupted run had just completed is taken, or thrown away if it is not right."""
    server.answers["file"] = whole()

    def left(content):
        (tmp_path / ".images.tar.part").write_bytes(content)
        (tmp_path / ".images.tar.mark").write_text('"v1"')
        return tmp_path / "images.tar"

    path = left(CONTENT)
    assert fetch(server, tmp_path).read_bytes() == CONTENT and not server.requests
    path.unlink()
    left(CONTENT + b"x")
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    path.unlink()
    left(b"x" * len(CONTENT))
    with pytest.raises(DataError, match="not have the SHA-256"):
        fetch(server, tmp_path)
    assert fetch(server, tmp_path).read_bytes() == CONTENT  # from nothing


WRONG = {
    "flipped byte": (CONTENT[:-1] + b"\0", "not have the SHA-256"),
    "short": (CONTENT[:-1], "not have the SHA-256"),
    "long": (CONTENT + b"x", "offers 300,001 bytes where 300,000 are expected"),
    "a page of a proxy": (b"<html>please log in</html>", "not have the SHA-256"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_content_is_never_published(server, tmp_path, kind):
    content, reason = WRONG[kind]
    server.answers["file"] = whole(content)
    with pytest.raises(DataError, match=reason):
        fetch(server, tmp_path)
    assert nothing_published(tmp_path)
    server.answers["file"] = whole(etag='"v2"')
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_compressed_answers_are_not_unpacked(server, tmp_path):
    def bomb(handler):
        handler.reply(200, {"Content-Encoding": "gzip", "Content-Length": len(CONTENT)}, CONTENT)

    server.answers["file"] = bomb
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.requests[0]["Accept-Encoding"] == "identity"


def test_a_server_need_not_say_how_much_comes(server, tmp_path):
    server.answers["file"] = lambda handler: handler.reply(200, {}, CONTENT)
    download(server.url + "file", tmp_path / "images.tar", 2 * len(CONTENT), None)
    assert (tmp_path / "images.tar").read_bytes() == CONTENT


def test_endless_body_is_cut(server, tmp_path):
    def endless(handler):
        handler.reply(200, {})
        for _ in range(10_000):
            handler.wfile.write(b"x" * 1000)

    server.answers["file"] = endless
    with pytest.raises(DataError, match="does not end after 300,000 bytes"):
        fetch(server, tmp_path)
    assert (tmp_path / ".images.tar.part").stat().st_size <= 300_000


def test_a_server_that_begins_slowly_is_waited_for(server, tmp_path, monkeypatch):
    def slow(handler):
        handler.reply(200, {"Content-Length": len(CONTENT)}, CONTENT[:100])
        for part in CONTENT[100:200], CONTENT[200:]:
            time.sleep(0.2)
            handler.wfile.write(part)
            handler.wfile.flush()

    monkeypatch.setattr(module, "ATTEMPTS", 1)
    server.answers["file"] = slow
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_what_came_before_makes_no_server_faster(server, tmp_path, monkeypatch):
    def drip(handler):
        headers = {"Content-Length": 180_000, "Content-Range": "bytes 120000-299999/300000"}
        handler.reply(206, headers, CONTENT[120_000:120_100])
        for _ in range(50):
            time.sleep(0.02)
            handler.wfile.write(b"x")

    monkeypatch.setattr(module, "ATTEMPTS", 1)
    server.answers["file"] = whole(breaks_at=120_000)
    with pytest.raises(DataError, match="closed after"):
        fetch(server, tmp_path)
    monkeypatch.setattr(module, "TIMEOUT", 0.15)
    server.answers["file"] = drip
    with pytest.raises(DataError, match=r"timed out|bytes per second"):
        fetch(server, tmp_path)


@pytest.mark.parametrize("fault", ["hang before", "hang inside", "drip"])
def test_slow_servers_are_given_up(server, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(module, "ATTEMPTS", 2)
    monkeypatch.setattr(module, "TIMEOUT", 0.15)
    stop = threading.Event()

    def slow(handler):
        if fault == "hang before":
            stop.wait(5)
            return
        handler.reply(200, {"Content-Length": len(CONTENT)}, CONTENT[:100])
        while not stop.wait(0.02 if fault == "drip" else 5):
            handler.wfile.write(b"x")

    server.answers["file"] = slow
    with pytest.raises(DataError, match=r"timed out|bytes per second"):
        fetch(server, tmp_path)
    stop.set()


@pytest.mark.parametrize(("code", "requests"), [(403, 1), (404, 1), (500, 4), (503, 4)])
def test_error_codes(server, tmp_path, code, requests, monkeypatch):
    slept = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    server.answers["file"] = lambda handler: handler.reply(code, {"Content-Length": 0})
    with pytest.raises(DataError, match=rf"{code}.*fetch images.tar in another way.*--images-tar"):
        fetch(server, tmp_path)
    assert len(server.requests) == requests
    assert slept == [0.01, 0.02, 0.04][: requests - 1]


def test_a_server_that_recovers(server, tmp_path):
    codes = iter([500, 503, 0])

    def answer(handler):
        if code := next(codes, None):
            return handler.reply(code, {"Content-Length": 0})
        return whole()(handler) if code is None else handler.wfile.write(b"no HTTP\r\n")

    server.answers["file"] = answer
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_nobody_there(tmp_path, server):
    urls = (
        "http://127.0.0.1:1/x",
        "http://no.such.host.invalid/x",
        "http://[x",
        "http://\u00fc/\u00fc",
    )
    for url in urls:
        with pytest.raises(DataError, match=r"lists\.tar in another way .* --lists-tar"):
            download(url, tmp_path / "lists.tar", 1, SHA256)


def redirect(target):
    return lambda handler: handler.reply(302, {"Location": target, "Content-Length": 0})


ODD = {
    "a length that is no number": lambda it: it.reply(200, {"Content-Length": "x"}, CONTENT),
    "an address that is none": redirect("http://[x"),
    "no range where none was asked for": lambda it: it.reply(416, {"Content-Length": 0}),
}


@pytest.mark.parametrize("kind", ODD)
def test_answers_that_make_no_sense_are_given_up(server, tmp_path, kind):
    server.answers["file"] = ODD[kind]
    with pytest.raises(DataError, match=r"file: .*: fetch images\.tar in another way"):
        fetch(server, tmp_path)


def test_redirects_are_followed_a_few_times(server, tmp_path):
    for i in range(5):
        server.answers[f"hop{i}"] = redirect(f"{server.url}hop{i + 1}")
    server.answers["hop5"] = whole()
    server.answers["file"] = redirect(server.url + "hop1")
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    (tmp_path / "images.tar").unlink()
    server.answers["file"] = redirect(server.url + "hop0")
    with pytest.raises(DataError, match="redirect"):
        fetch(server, tmp_path)
    server.answers["file"] = redirect(server.url + "file")
    with pytest.raises(DataError, match="redirect"):
        fetch(server, tmp_path)


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x"])
def test_redirects_out_of_the_web_are_refused(server, tmp_path, target):
    server.answers["file"] = redirect(target)
    with pytest.raises(DataError, match=r"which is refused|is not allowed"):
        fetch(server, tmp_path)
    assert nothing_published(tmp_path)
    with pytest.raises(ConfigError, match="not an http or https address"):
        download(target, tmp_path / "images.tar", 1, SHA256)


def test_redirect_from_https_to_http_is_refused():
    request = module.Request("https://example.org/x")
    with pytest.raises(DataError, match="redirects to http://"):
        Redirects().redirect_request(request, None, 302, "", {}, "http://example.org/x")
    new = "https://example.org/y"
    assert Redirects().redirect_request(request, None, 302, "", {}, new).full_url == new


@pytest.mark.filterwarnings("ignore:waiting for the process")  # if both meet
def test_two_at_once(server, tmp_path):
    server.answers["file"] = whole()
    errors = []

    def work():
        try:
            fetch(server, tmp_path)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and len(server.requests) == 1
    assert (tmp_path / "images.tar").read_bytes() == CONTENT


def test_prepare_downloads_what_it_needs(server, tmp_path, monkeypatch, capsys):
    """`data prepare stanford-dogs` from an empty folder to verified batches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = layout.write_archives(tmp_path / "served")
    for path in root.iterdir():
        server.answers[path.name] = whole(path.read_bytes())

    def code(*arguments):
        with pytest.raises(SystemExit) as exit:
            main(["data", "prepare", "stanford-dogs", "--image-size", "24", *arguments])
        return exit.value.code

    assert code("--url", server.url) == 3  # not the official archives
    assert "not have the SHA-256 a443fc2f9a" in capsys.readouterr().err
    official = {p.stem: (p.stat().st_size, stanford_dogs.file_sha256(p)) for p in root.iterdir()}
    monkeypatch.setattr(stanford_dogs, "OFFICIAL", official)
    monkeypatch.setattr(stanford_dogs, "URL", server.url)
    server.requests.clear()
    assert code() == 0
    assert len(server.requests) == 2
    dataset = open_dataset("stanford-dogs", 24)
    assert dataset.notes["verified"] is True and len(dataset.images) == 31
    del dataset  # Windows replaces no cache that is open
    assert code() == 0 and len(server.requests) == 2  # nothing to do
    with monkeypatch.context() as patch:
        patch.setitem(data.DECODER, "pillow", "0")
        assert code() == 0 and len(server.requests) == 2
        assert open_dataset("stanford-dogs", 24).recipe["pillow"] == "0"
    assert code("--crop", "boxes") == 0 and len(server.requests) == 3
    assert open_dataset("stanford-dogs", 24).options.crop == "boxes"
    assert code() == 0 and len(server.requests) == 3  # as asked for now, not as it was made
    assert open_dataset("stanford-dogs", 24).options.crop == "centre"
    assert code("--url", "file:///etc") == 2


def test_unverified_download(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for path in layout.write_archives(tmp_path / "served").iterdir():
        server.answers[path.name] = whole(path.read_bytes())
    arguments = ["data", "prepare", "stanford-dogs", "--url", server.url, "--allow-unverified"]
    for _ in range(2):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 0
        assert open_dataset("stanford-dogs").notes["verified"] is False
        assert "warning: not the official archives" in capsys.readouterr().err
    assert len(server.requests) == 2  # what is there is taken


def test_each_address_has_downloads_of_its_own_and_shows_their_progress(
    server, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, images in (("a", layout.image_members()), ("b", layout.image_members()[::-1])):
        for path in layout.write_archives(tmp_path / name, images).iterdir():
            server.answers[f"{name}/{path.name}"] = whole(path.read_bytes())
        told, size = [], (tmp_path / name / "images.tar").stat().st_size
        prepare(
            "stanford-dogs", 24, Options(), lambda *a, told=told: told.append(a),
            url=f"{server.url}{name}", allow_unverified=True,
        )  # fmt: skip
        assert (size, size) in told and (31, 31) in told
    assert len(server.requests) == 4
