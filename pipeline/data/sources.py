"""Where published files come from: sources tried in order, every file checked against its digest."""

import gzip
import hashlib
import os
import shutil
import socket
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from pipeline.errors import UserError

Log = Callable[[str], None]
"""Takes one line for the user."""

CHUNK = 1 << 18
ATTEMPTS = 3
"""Requests for one file, as long as each brings something, before the source is given up."""


class SourceError(Exception):
    """Why a source gave nothing, in a few words."""


@dataclass(frozen=True)
class File:
    """One published file. Mirrors may compress the same content differently, so either form can carry the digest."""

    name: str
    """As published."""
    kept: str
    """As kept; where it differs from `name`, the file is published gzipped and kept decompressed."""
    content: str = ""
    """Digest of what is kept, as `sha256:HEX`."""
    published: str = ""
    """Digest of the file as published, as `md5:HEX`."""


class Source(Protocol):
    """A place that may have the files; its `str` names it to the user."""

    def fetch(self, file: File, *, raw: Path, state: Path, log: Log) -> None:
        """Puts the checked file into `raw`, or raises SourceError; `state` is private and survives a kill."""


def fetch(files: Sequence[File], *, dataset: str, sources: Sequence[Source], raw: Path, state: Path, log: Log) -> None:
    """Brings every file into `raw`, from the first source that has it.

    Raises:
        UserError: no source gave the files; the line says why for each.
    """
    assert all(file.content or file.published for file in files), files
    failures = []
    for source in sources:
        try:
            for file in files:
                if not (raw / file.kept).exists():
                    source.fetch(file, raw=raw, state=state, log=log)
        except SourceError as error:
            failures.append(f"{source}: {error}")
            log(failures[-1])
        else:
            log(f"{dataset}: from {source}, digests verified")
            return
    advice = "check the network and its proxy (HTTP_PROXY, HTTPS_PROXY), then run again"
    raise UserError(f"{dataset}: no source gave its files ({'; '.join(failures)}); {advice}")


def place(path: Path, *, file: File, raw: Path) -> None:
    """Copies a file as published from `path` into `raw`, decompressed where it is kept so, if its digests are right.

    Raises:
        SourceError: the file is missing, not gzip, or not the one that was published.
    """
    if not path.is_file():
        raise SourceError(f"has no {file.name}")
    _check(path, digest=file.published, name=file.name)
    target = raw / file.kept
    try:
        with gzip.open(path) if file.kept != file.name else path.open("rb") as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, CHUNK)
        _check(target, digest=file.content, name=file.name)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        target.unlink()
        raise SourceError(f"{file.name} is not a whole gzip file") from None
    except SourceError:
        target.unlink()
        raise


def _check(path: Path, *, digest: str, name: str) -> None:
    if not digest:
        return
    algorithm, expected = digest.split(":")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
    if found != expected:
        raise SourceError(f"{name}: {algorithm} is {found}, expected {expected}")


@dataclass(frozen=True)
class Installed:
    """A system package that has put the files on this machine already."""

    package: str
    folder: Path

    def __str__(self) -> str:
        return f"installed package {self.package}"

    def fetch(self, file: File, *, raw: Path, state: Path, log: Log) -> None:  # noqa: ARG002
        if not self.folder.is_dir():
            raise SourceError(f"not installed (apt install {self.package})")
        place(self.folder / file.name, file=file, raw=raw)


@dataclass(frozen=True)
class Publisher:
    """A folder on a web server. A download that was cut short is taken up where it stopped."""

    url: str
    """Ends with a slash; a file's name is appended."""
    connect_seconds: float = 5
    read_seconds: float = 30

    def __str__(self) -> str:
        return self.url

    def fetch(self, file: File, *, raw: Path, state: Path, log: Log) -> None:
        whole, part = state / file.name, state / f"{file.name}.part"
        resumed = whole.exists() or part.exists()
        if not whole.exists():
            check_reachable(self.url, seconds=self.connect_seconds)
            self._download(file, part=part, log=log)
            part.replace(whole)
        try:
            place(whole, file=file, raw=raw)
        except SourceError as error:
            whole.unlink()
            log(f"{error}; deleted")
            if not resumed:
                raise
            self.fetch(file, raw=raw, state=state, log=log)

    def _download(self, file: File, *, part: Path, log: Log) -> None:
        import requests
        import urllib3

        reason = ""
        for _ in range(ATTEMPTS):
            start = _size(part)
            try:
                if self._request(file, start=start, part=part, log=log):
                    return
                reason = "cannot go on from a partial download"
            except (requests.Timeout, urllib3.exceptions.TimeoutError):
                reason = f"no answer within {self.read_seconds:g} s"
            except requests.exceptions.SSLError:
                raise SourceError("its certificate cannot be verified") from None
            except (requests.RequestException, urllib3.exceptions.HTTPError):
                reason = "the connection broke off"
            if _size(part) == start:  # nothing came: trying again would only make the user wait
                break
            log(f"{file.name}: {reason}; trying again")
        raise SourceError(reason)

    def _request(self, file: File, *, start: int, part: Path, log: Log) -> bool:
        """One request for the bytes from `start`; false if the server cannot go on from there."""
        import requests

        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        timeout = (self.connect_seconds, self.read_seconds)
        with requests.get(self.url + file.name, headers=headers, stream=True, timeout=timeout) as response:
            span = response.headers.get("Content-Range", "")
            if response.status_code == 416 and span == f"bytes */{start}":
                return True
            if response.status_code == 416 or (response.status_code == 206 and not span.startswith(f"bytes {start}-")):
                part.unlink()
                return False
            if response.status_code not in (200, 206):
                raise SourceError(f"HTTP {response.status_code} for {file.name}")
            done = start if response.status_code == 206 else 0
            total = done + int(response.headers.get("Content-Length", 0))
            with _progress(file.name, done=done, total=total, log=log) as advance, part.open("ab") as sink:
                sink.truncate(done)
                # Undecoded: servers that label a .gz file as gzip transfer encoding would have it unpacked on the way.
                for chunk in response.raw.stream(CHUNK, decode_content=False):
                    sink.write(chunk)
                    advance(len(chunk))
        return True


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def check_reachable(url: str, *, seconds: float = 5) -> None:
    """Knocks at the host of `url`, or at the proxy that leads there.

    Raises:
        SourceError: no connection within `seconds`, in all: name resolution, which cannot be interrupted, and every
            address of the host share them.
    """
    import requests

    proxy = requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url))
    target = proxy or url
    parts = urlsplit(target if "://" in target else f"http://{target}")
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 1080)
    outcome: list[str] = []

    def knock() -> None:
        try:
            socket.create_connection((parts.hostname or "", port), timeout=seconds / 2).close()
            outcome.append("")
        except socket.gaierror:
            outcome.append("cannot resolve host")
        except TimeoutError:
            outcome.append("no answer")
        except OSError as error:
            outcome.append((error.strerror or str(error)).lower())

    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(seconds)
    problem = outcome[0] if outcome else f"no answer within {seconds:g} s"
    if problem:
        raise SourceError(f"{problem} {parts.hostname}{' (proxy)' if proxy else ''}")


@contextmanager
def _progress(name: str, *, done: int, total: int, log: Log) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told each number of bytes received: a bar on a terminal, else a line now and then."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    log(f"fetching {name}{f', {total / 1e6:.1f} MB' if total else ''}{f', from byte {done}' if done else ''}")
    if console.is_terminal:
        columns = (progress.BarColumn(), progress.DownloadColumn(), progress.TimeRemainingColumn())
        with progress.Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(name, total=total or None, completed=done)
            yield lambda count: bar.advance(task, count)
        return
    last = time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        if time.monotonic() - last > 10:
            last = time.monotonic()
            log(f"{name}: {done / 1e6:.0f} of {total / 1e6:.0f} MB")

    yield advance


@dataclass(frozen=True)
class DebianPackage:
    """A package from the Debian mirrors that this machine's apt knows; needs neither root nor lists made before."""

    package: str
    folder: str
    """Where the package keeps the files, relative to the root."""
    seconds: float = 600
    """Longest that one apt command may take."""

    def __str__(self) -> str:
        return f"apt-get download {self.package}"

    def fetch(self, file: File, *, raw: Path, state: Path, log: Log) -> None:
        unpacked = state.resolve() / "apt" / "unpacked"
        if not unpacked.is_dir():
            self._unpack(unpacked, log=log)
        place(unpacked / self.folder / file.name, file=file, raw=raw)

    def _unpack(self, unpacked: Path, *, log: Log) -> None:
        for tool in ("apt-get", "dpkg-deb"):
            if not shutil.which(tool):
                raise SourceError(f"{tool} is not on this machine")
        home = unpacked.parent
        archives = home / "archives"
        shutil.rmtree(archives, ignore_errors=True)
        for folder in (archives, home / "lists" / "partial", home / "cache" / "archives" / "partial"):
            folder.mkdir(parents=True, exist_ok=True)
        (home / "apt.conf").write_text(_APT_CONF.format(home=home), encoding="utf-8")
        apt = ["apt-get", "-q", "-c", str(home / "apt.conf")]
        log("making private package lists with apt-get update")
        try:
            self._run([*apt, "update"], folder=archives)
        except SourceError as error:  # another package source of this machine may be broken without harm here
            log(f"apt-get update: {error}")
        log(str(self))
        self._run([*apt, "download", self.package], folder=archives)
        part = home / "unpacked.part"
        shutil.rmtree(part, ignore_errors=True)
        self._run(["dpkg-deb", "-x", str(next(archives.glob("*.deb"))), str(part)], folder=home)
        part.replace(unpacked)

    def _run(self, command: list[str], *, folder: Path) -> None:
        # A file and no pipe: apt's helper processes would hold a pipe open beyond a timeout.
        output = folder.parent / "output.txt"
        try:
            with output.open("w", encoding="utf-8") as sink:
                code = subprocess.run(
                    command,
                    cwd=folder,
                    env=os.environ | {"LC_ALL": "C"},
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    timeout=self.seconds,
                    check=False,
                ).returncode
        except subprocess.TimeoutExpired:
            raise SourceError(f"{command[0]} took more than {self.seconds:g} s") from None
        if code:
            lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
            said = [line for line in lines if line.startswith(("E:", "dpkg-deb: error:"))]
            raise SourceError(said[-1] if said else f"{command[0]} failed with code {code}")


_APT_CONF = """\
Dir::State "{home}";
Dir::State::lists "{home}/lists";
Dir::Cache "{home}/cache";
Dir::Cache::archives "{home}/cache/archives";
// Else apt run by root drops to a user who may not be able to enter the folder.
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "1";
Acquire::http::Timeout "10";
Acquire::https::Timeout "10";
// The system's hooks act on the system's lists and caches, which stay untouched.
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
"""
