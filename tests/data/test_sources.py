import gzip
import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.data import sources
from pipeline.data.sources import DebianPackage, File, Installed, Publisher, SourceError, check_reachable
from pipeline.errors import UserError

CONTENT = bytes(range(256)) * 400
PACKED = gzip.compress(CONTENT, mtime=0)
FILE = File("numbers.gz", kept="numbers", content=f"sha256:{hashlib.sha256(CONTENT).hexdigest()}")


class Server:
    """A web server with one file; `seen` lists the Range header of every request for it."""

    def __init__(self, *, data: bytes = PACKED, ranges: bool = True, status: int = 200, cut: int = 0) -> None:
        self.data, self.ranges, self.status, self.cut = data, ranges, status, cut
        self.seen: list[str | None] = []
        self.url = ""

    def reply(self, handler: BaseHTTPRequestHandler) -> None:
        span = handler.headers.get("Range")
        self.seen.append(span)
        start = int(span.removeprefix("bytes=").removesuffix("-")) if span and self.ranges else 0
        if self.status != 200:
            handler.send_response(self.status)
            handler.send_header("Content-Length", "0")
        elif start >= len(self.data):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(self.data)}")
            handler.send_header("Content-Length", "0")
        else:
            body = self.data[start:]
            handler.send_response(206 if start else 200)
            if start:
                handler.send_header("Content-Range", f"bytes {start}-{len(self.data) - 1}/{len(self.data)}")
            handler.send_header("Content-Encoding", "gzip")  # as some servers label .gz files
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body[: self.cut or None])
            return
        handler.end_headers()


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.reply(self)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_port}/"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    return folder


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    folder.mkdir()
    return folder


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_whole_download_is_unpacked(raw: Path, state: Path) -> None:
    lines: list[str] = []
    with serving(Server()) as server:
        sources.fetch([FILE], dataset="x", sources=[Publisher(server.url)], raw=raw, state=state, log=lines.append)
    assert (raw / "numbers").read_bytes() == CONTENT
    assert server.seen == [None]
    assert lines == ["fetching numbers.gz, 0.0 MB", f"x: from {server.url}, digests verified"]


def test_a_partial_download_is_resumed(raw: Path, state: Path) -> None:
    (state / "numbers.gz.part").write_bytes(PACKED[:100])
    with serving(Server()) as server:
        Publisher(server.url).fetch(FILE, raw=raw, state=state, log=print)
    assert (raw / "numbers").read_bytes() == CONTENT
    assert server.seen == ["bytes=100-"]


def test_a_server_that_ignores_ranges_sends_the_whole(raw: Path, state: Path) -> None:
    (state / "numbers.gz.part").write_bytes(b"?" * 100)
    with serving(Server(ranges=False)) as server:
        Publisher(server.url).fetch(FILE, raw=raw, state=state, log=print)
    assert (raw / "numbers").read_bytes() == CONTENT
    assert len(server.seen) == 1


@pytest.mark.parametrize("name", ["numbers.gz.part", "numbers.gz"])
def test_a_download_killed_at_its_very_end_is_not_repeated(raw: Path, state: Path, name: str) -> None:
    (state / name).write_bytes(PACKED)
    with serving(Server()) as server:
        Publisher(server.url).fetch(FILE, raw=raw, state=state, log=print)
    assert (raw / "numbers").read_bytes() == CONTENT
    assert server.seen == ([f"bytes={len(PACKED)}-"] if name.endswith(".part") else [])


@pytest.mark.parametrize("size", [100, len(PACKED) + 5])
def test_a_partial_download_of_something_else_is_begun_again(raw: Path, state: Path, size: int) -> None:
    (state / "numbers.gz.part").write_bytes(b"?" * size)
    with serving(Server()) as server:
        Publisher(server.url).fetch(FILE, raw=raw, state=state, log=print)
    assert (raw / "numbers").read_bytes() == CONTENT
    assert server.seen == [f"bytes={size}-", None]


def test_a_connection_that_breaks_off_is_taken_up_again_and_kept_for_the_next_run(raw: Path, state: Path) -> None:
    with serving(Server(cut=100)) as server, pytest.raises(SourceError, match="the connection broke off"):
        Publisher(server.url).fetch(FILE, raw=raw, state=state, log=print)
    assert server.seen == [None, "bytes=100-", "bytes=200-"]
    assert (state / "numbers.gz.part").read_bytes() == PACKED[:300]
    assert not list(raw.iterdir())


@pytest.mark.parametrize("published", ["", f"md5:{hashlib.md5(PACKED).hexdigest()}"])
def test_a_wrong_digest_is_named_and_deleted(raw: Path, state: Path, published: str) -> None:
    other = gzip.compress(b"other")
    file = File("numbers.gz", kept="numbers", content="" if published else FILE.content, published=published)
    wrong = hashlib.md5(other).hexdigest() if published else hashlib.sha256(b"other").hexdigest()
    with serving(Server(data=other)) as server, pytest.raises(SourceError) as caught:
        Publisher(server.url).fetch(file, raw=raw, state=state, log=print)
    algorithm, expected = (published or FILE.content).split(":")
    assert str(caught.value) == f"numbers.gz: {algorithm} is {wrong}, expected {expected}"
    assert not list(raw.iterdir())
    assert not list(state.iterdir())


@pytest.mark.parametrize("data", [b"<html>", PACKED[:-20], PACKED[:40] + b"????" + PACKED[44:]])
def test_what_is_not_a_whole_gzip_file_is_refused(raw: Path, state: Path, data: bytes) -> None:
    with serving(Server(data=data)) as server, pytest.raises(SourceError, match=r"not a whole gzip file|sha256 is"):
        Publisher(server.url).fetch(FILE, raw=raw, state=state, log=print)
    assert not list(raw.iterdir())


def test_an_archive_is_kept_as_published(raw: Path, state: Path) -> None:
    file = File("all.tar.gz", kept="all.tar.gz", published=f"md5:{hashlib.md5(PACKED).hexdigest()}")
    with serving(Server()) as server:
        Publisher(server.url).fetch(file, raw=raw, state=state, log=print)
    assert (raw / "all.tar.gz").read_bytes() == PACKED


def test_every_source_is_tried_and_its_failure_told_in_one_line(raw: Path, state: Path, tmp_path: Path) -> None:
    port = closed_port()
    with serving(Server(status=404)) as server, pytest.raises(UserError) as caught:
        sources.fetch(
            [FILE],
            dataset="numbers",
            sources=[
                Installed("pkg", tmp_path / "none"),
                Publisher(server.url),
                Publisher(f"http://127.0.0.1:{port}/"),
            ],
            raw=raw,
            state=state,
            log=print,
        )
    assert str(caught.value) == (
        "numbers: no source gave its files (installed package pkg: not installed (apt install pkg); "
        f"{server.url}: HTTP 404 for numbers.gz; http://127.0.0.1:{port}/: connection refused 127.0.0.1); "
        "check the network and its proxy (HTTP_PROXY, HTTPS_PROXY), then run again"
    )


def test_the_next_source_gives_what_the_one_before_lacked(raw: Path, state: Path, tmp_path: Path) -> None:
    second = File("second", kept="second", published=f"md5:{hashlib.md5(PACKED).hexdigest()}")
    (tmp_path / "numbers.gz").write_bytes(PACKED)
    with serving(Server()) as server:
        sources.fetch(
            [FILE, second],
            dataset="numbers",
            sources=[Installed("pkg", tmp_path), Publisher(server.url)],
            raw=raw,
            state=state,
            log=print,
        )
    assert len(server.seen) == 1
    assert sorted(path.name for path in raw.iterdir()) == ["numbers", "second"]


def test_a_silent_server_is_given_up_after_one_read_timeout(raw: Path, state: Path) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=8) as silent:
        publisher = Publisher(f"http://127.0.0.1:{silent.getsockname()[1]}/", read_seconds=0.05)
        lines: list[str] = []
        with pytest.raises(SourceError, match=r"no answer within 0\.05 s"):
            publisher.fetch(FILE, raw=raw, state=state, log=lines.append)
    assert lines == []


def test_a_name_lookup_that_hangs_does_not_block(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def hang(*_: object, **__: object) -> object:
        released.wait(5)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    begun = time.monotonic()
    with pytest.raises(SourceError, match=r"no answer within 0\.1 s publisher\.example"):
        check_reachable("https://publisher.example/", seconds=0.1)
    assert time.monotonic() - begun < 1
    released.set()


def test_a_host_without_an_address_and_a_proxy_that_is_down_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*_: object, **__: object) -> object:
        raise socket.gaierror

    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", nowhere)
        with pytest.raises(SourceError, match=r"cannot resolve host publisher\.example"):
            check_reachable("https://publisher.example/")
    for scheme in ("", "http://"):
        monkeypatch.setenv("https_proxy", f"{scheme}127.0.0.1:{closed_port()}")
        with pytest.raises(SourceError, match=r"connection refused 127\.0\.0\.1 \(proxy\)"):
            check_reachable("https://publisher.example/")


APT_GET = """#!/bin/sh
# apt-get -q -c CONF update | download PACKAGE
echo "$4 $PWD" >> "$CALLS"
grep -q "^Dir::State \\"$APT_HOME\\";" "$3" || exit 9
case "$4" in
update) echo "E: Failed to fetch http://elsewhere.example/InRelease" ; exit 100 ;;
download) [ "$5" = numbers ] || { echo "E: Unable to locate package $5"; exit 100; }; echo deb > numbers_1_all.deb ;;
esac
"""
DPKG_DEB = """#!/bin/sh
mkdir -p "$3/usr/share/numbers" && cp "$PACKED" "$3/usr/share/numbers/numbers.gz"
"""


@pytest.fixture
def apt(tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for apt-get and dpkg-deb; gives the file that lists apt-get's calls."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, script in (("apt-get", APT_GET), ("dpkg-deb", DPKG_DEB)):
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    (tmp_path / "packed").write_bytes(PACKED)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PACKED", str(tmp_path / "packed"))
    monkeypatch.setenv("APT_HOME", str(state / "apt"))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path / "calls"


def test_a_debian_package_is_fetched_once_in_a_private_folder(raw: Path, state: Path, apt: Path) -> None:
    source = DebianPackage("numbers", folder="usr/share/numbers")
    for _ in range(2):
        source.fetch(FILE, raw=raw, state=state, log=print)
    assert (raw / "numbers").read_bytes() == CONTENT
    archives = (state / "apt" / "archives").resolve()
    assert apt.read_text().splitlines() == [f"update {archives}", f"download {archives}"]


@pytest.mark.usefixtures("apt")
def test_what_apt_says_is_passed_on(raw: Path, state: Path) -> None:
    with pytest.raises(SourceError, match=r"^E: Unable to locate package letters$"):
        DebianPackage("letters", folder="x").fetch(FILE, raw=raw, state=state, log=print)


def test_apt_that_hangs_is_given_up(raw: Path, state: Path, apt: Path, tmp_path: Path) -> None:
    del apt
    (tmp_path / "bin" / "apt-get").write_text("#!/bin/sh\nexec sleep 5\n")
    with pytest.raises(SourceError, match=r"^apt-get took more than 0\.05 s$"):
        DebianPackage("numbers", folder="x", seconds=0.05).fetch(FILE, raw=raw, state=state, log=print)


def test_no_apt_on_this_machine(raw: Path, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SourceError, match="apt-get is not on this machine"):
        DebianPackage("numbers", folder="x").fetch(FILE, raw=raw, state=state, log=print)
