"""Fetch one file over HTTP(S) into a cache: resumable, checked, and safe when several processes want the same file.

    cache_dir/<first 16 hex of the URL's SHA-256>/<name>             the file; it has this name only after it was checked
                                                  <name>.json        {url, sha256, bytes}: written last, nothing counts as cached without it
                                                  <name>.part        what came so far; a later call continues it
                                                  <name>.part.json   {url, bytes, etag, last_modified} of the answer that `.part` comes from
                                                  <name>.lock        locked by who downloads; others wait, then find the file. Stays, empty

The lock is the operating system's (flock; msvcrt.locking on Windows), not that the file is there: it ends with its process, in any event.
A cached file is served without it. A URL's credentials and query may hold secrets: neither is shown or stored.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import math
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn
from urllib import request as web
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, unquote, urlsplit

from modelcrate_bundle.errors import ConfigError, DownloadError, OutputError
from modelcrate_converter.progress import Advanced, Noted, Report, ignore

BACKOFF_S: tuple[float, ...] = (0.5, 1.0, 2.0)  # the pause before each further attempt
LOCK_POLL_S = 0.1
REPORT_EVERY_S = 0.1

_HINT_LOCAL = "download it elsewhere and give its path"
_HINT_AGAIN = f"run the same command again to continue where it stopped, or {_HINT_LOCAL}"
# Eight digits that read as a date, with no other date behind them, are taken for one.
_HASH_IN_NAME = re.compile(r"-(?!(?:19|20)\d\d[01]\d[0-3]\d\.)([0-9a-f]{8})(?:_\d{8})?\.(?:pth|pt|safetensors|zip|onnx)$")


class _TransientError(DownloadError):
    """A failure that another attempt may cure; after the last attempt the caller gets it as the DownloadError that it is."""


@dataclass(frozen=True, slots=True)
class _Job:
    """One download: `url` is what is requested, `shown` what messages may show of it."""

    url: str
    shown: str
    authorization: str | None
    file: Path
    report: Report
    timeout_s: float
    max_bytes: int

    def beside(self, suffix: str) -> Path:
        return self.file.with_name(self.file.name + suffix)

    def drop_part(self) -> None:
        self.beside(".part.json").unlink(missing_ok=True)  # first, since bytes without their facts are never continued
        self.beside(".part").unlink(missing_ok=True)

    def fail(self, what: str, *, hint: str = _HINT_LOCAL, transient: bool = False) -> NoReturn:
        message = f"{self.shown}: {what}"
        raise (_TransientError if transient else DownloadError)(message, hint=hint) from None


def default_cache_dir() -> Path:
    """Where downloads are kept: $MODELCRATE_CACHE, else `modelcrate` in the platform's cache folder of the user."""
    if chosen := os.environ.get("MODELCRATE_CACHE"):
        return Path(chosen).expanduser()
    base = Path(os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", ""))
    # The XDG specification says to ignore a relative path.
    return (base if base.is_absolute() else Path.home() / ".cache") / "modelcrate"


def expected_sha256_prefix(url: str) -> str | None:
    """The 8 hex digits of the SHA-256 that OpenMMLab, torchvision and timm put at the end of a file's name, or None.

    Nothing is read off a file in OpenMMLab's `onnx_sdk/`: it bears the name of the .pth it was converted from, with the hash of that.
    """
    path = unquote(re.split("[?#]", url, maxsplit=1)[0])
    found = _HASH_IN_NAME.search(path)
    return found[1] if found and "/onnx_sdk/" not in path else None


def download(
    url: str, *, cache_dir: Path, sha256: str | None = None, offline: bool = False,
    report: Report = ignore, timeout_s: float = 30.0, max_bytes: int = 8 * 2**30,
) -> Path:  # fmt: skip
    """Return the complete, checked local file of a URL, from the cache or from the network, under the sanitised name from the URL.

    Processes and threads may ask for the same URL at once: one downloads under a lock, the others wait for it. A cached file is hashed,
    and fetched again if it was damaged. What a failed or interrupted call got stays; the next continues it if the server still has it.

    Args:
        url: http or https; `user:password@` is sent as HTTP basic authentication, to the first host only.
        cache_dir: made when it does not exist; see `default_cache_dir`.
        sha256: the digest, or its first 8 or more hex digits; None takes `expected_sha256_prefix(url)`; any content if that is None too.
        offline: never touch the network.
        report: gets `Advanced` in bytes, at most 10 a second beside the first and the last, and `Noted` before a retry or a wait.
        timeout_s: longest silence of the server in seconds, not the time of the whole download.
        max_bytes: a longer file is refused.

    Raises:
        ConfigError: not an http(s) URL, or `sha256` is not 8 to 64 hex digits.
        DownloadError: the network, the server, the length or the hash; or `offline` and not cached.
        OutputError: the cache cannot be written.
    """
    expected = expected_sha256_prefix(url) if sha256 is None else sha256.strip().lower()
    if expected is not None and not re.fullmatch(r"[0-9a-f]{8,64}", expected):
        message = f"sha256 {sha256!r}: expected 8 to 64 hex digits, found {len(expected)} characters"
        raise ConfigError(message, hint="give the SHA-256 of the file, or leave it out")
    job = _plan(url, cache_dir, report, timeout_s, max_bytes)
    problem = _problem_with_cached(job, expected)
    if problem is not None and offline:
        job.fail(f"{problem} ({job.file}), and --offline is set", hint=f"run once without --offline, or {_HINT_LOCAL}")
    if problem is not None:
        with _locked(job):
            if _problem_with_cached(job, expected) is not None:  # whoever held the lock before may have brought the file
                _fetch(job, expected)
    return job.file


def _plan(url: str, cache_dir: Path, report: Report, timeout_s: float, max_bytes: int) -> _Job:
    parts = SplitResult("", "", "", "", "")
    try:
        parts = urlsplit(url)
        # urllib sends spaces and line ends as they are, which would let a URL write headers of its own.
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and re.fullmatch(r"[!-~]+", url)
    except ValueError:
        usable = False
    if not usable:
        scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*(?=://)", url)
        message = f"not a web address: expected http(s)://host/path in printable ASCII, found scheme {scheme[0] if scheme else 'none'}"
        raise ConfigError(message, hint="give an http(s) URL with other characters percent-encoded, a zoo name or a local path")
    login = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    authorization = None if login == ":" else f"Basic {base64.b64encode(login.encode()).decode()}"
    clean = parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="")
    # No separators, no leading dot; the end of a long name says more (hash, suffix) than its beginning.
    name = re.sub(r"[^A-Za-z0-9._+-]", "_", unquote(parts.path.rpartition("/")[2]))[-120:].strip(".") or "download"
    file = cache_dir / hashlib.sha256(clean.geturl().encode()).hexdigest()[:16] / name
    return _Job(clean.geturl(), clean._replace(query="").geturl(), authorization, file, report, timeout_s, max_bytes)


def _problem_with_cached(job: _Job, expected: str | None) -> str | None:
    """Why the cached file cannot be served, None when it can."""
    sidecar = _read_json(job.beside(".json"))
    recorded = str(sidecar.get("sha256"))
    if not sidecar or not job.file.is_file():
        return "not in the cache"
    if expected is not None and not recorded.startswith(expected):
        return f"not in the cache: expected SHA-256 {expected}, found {recorded}"
    with suppress(OSError):
        if job.file.stat().st_size == sidecar.get("bytes") and _sha256_of(job.file) == recorded:
            return None
    return "not in the cache: unreadable, or damaged since it was stored"


def _fetch(job: _Job, expected: str | None) -> None:
    """Bring `.part` to its full length, in as many attempts as `BACKOFF_S` allows, check it, and give it its name."""
    for attempt, pause_s in enumerate(BACKOFF_S, start=1):
        try:
            _attempt(job)
            break
        except _TransientError as error:
            job.report(Noted(text=f"{error}; trying again ({attempt} of {len(BACKOFF_S)})", level="warning"))
            time.sleep(pause_s)
    else:
        _attempt(job)
    part = job.beside(".part")
    with _disk(part):
        digest = _sha256_of(part)
        if expected is not None and not digest.startswith(expected):
            job.drop_part()
            job.fail(f"not the expected file: expected SHA-256 {expected}, found {digest}", hint=f"run it again, or {_HINT_LOCAL}")
        # A crash between these lines leaves a file that its sidecar does not fit, or that has none: it is fetched again.
        size = part.replace(job.file).stat().st_size
        job.beside(".json").write_text(json.dumps({"url": job.shown, "sha256": digest, "bytes": size}), encoding="utf-8")
        job.beside(".part.json").unlink(missing_ok=True)


def _attempt(job: _Job) -> None:
    part_path, facts_path = job.beside(".part"), job.beside(".part.json")
    with _disk(part_path):
        facts = _read_json(facts_path)
        # Without a validator nothing tells whether the server still has the file that the part is from.
        offset = part_path.stat().st_size if ("etag" in facts or "last_modified" in facts) and part_path.is_file() else 0
        response = _request(job, offset, facts) or (_request(job, 0, {}) if offset else None)
        if response is None:
            job.fail("the server sends neither the whole file as it is nor the part that was asked for")
        with response:
            if response.status == 200:
                offset = 0
                job.drop_part()
                facts_path.write_text(json.dumps({"url": job.shown, "bytes": response.length, **_validators(response)}), encoding="utf-8")
            with part_path.open("ab") as part:
                _copy(job, response, part, done=offset, total=None if response.length is None else offset + response.length)


def _copy(job: _Job, response: http.client.HTTPResponse, part: IO[bytes], *, done: int, total: int | None) -> None:
    reported_s = -math.inf
    while True:
        if (found := max(done, total or 0)) > job.max_bytes:
            part.truncate(0)  # nothing can come of it, so it need not take up the disk
            job.fail(f"too long: expected at most {job.max_bytes} bytes, found {found} or more")
        if time.monotonic() - reported_s >= REPORT_EVERY_S:
            reported_s = time.monotonic()
            job.report(Advanced(name=job.file.name, done=done, total=total, unit="bytes"))
        with _network(job):
            chunk = response.read1(1 << 18)
        if not chunk:
            break
        part.write(chunk)
        done += len(chunk)
    part.flush()
    os.fsync(part.fileno())
    if total is not None and done != total:
        job.fail(f"ended early: expected {total} bytes, found {done}", hint=_HINT_AGAIN, transient=True)
    job.report(Advanced(name=job.file.name, done=done, total=total, unit="bytes"))


def _validators(response: http.client.HTTPResponse) -> dict[str, str]:
    """ETag and Last-Modified where they are fit for If-Range: weak tags are not (RFC 9110, 13.1.5), nor is anything but printable ASCII."""
    found = {"etag": response.headers.get("ETag", ""), "last_modified": response.headers.get("Last-Modified", "")}
    return {key: value for key, value in found.items() if re.fullmatch(r"(?!W/)[ -~]+", value)}


def _request(job: _Job, offset: int, facts: dict[str, Any]) -> http.client.HTTPResponse | None:
    """Open the URL from a byte offset on: an answer 200 with the whole, or 206 with exactly that part; None for other successes and 416."""
    request = web.Request(job.url, headers={"User-Agent": "modelcrate"})  # noqa: S310 - _plan checked the scheme
    if job.authorization is not None:
        request.add_unredirected_header("Authorization", job.authorization)
    if offset:
        request.add_header("Range", f"bytes={offset}-")
        request.add_header("If-Range", str(facts.get("etag") or facts.get("last_modified")))
    with _network(job):
        try:
            response: http.client.HTTPResponse = _opener().open(request, timeout=job.timeout_s)
        except HTTPError as error:
            error.close()
            if error.code == 416 and offset:
                return None
            raise
    usable = response.status == 200
    if response.status == 206 and (span := re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))):
        # Some servers ignore If-Range, so what the answer says of the file is compared as well.
        same = all(facts.get(key, value) == value for key, value in _validators(response).items())
        usable = same and 0 < offset == int(span[1]) and facts.get("bytes") in (None, int(span[2]))
    if usable and response.headers.get("Content-Encoding", "identity") == "identity":
        return response
    response.close()
    return None


@contextmanager
def _network(job: _Job) -> Iterator[None]:
    """Turn what the network does into one DownloadError; foreign texts are left out, since they may quote a redirect's credentials."""
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = error.reason if isinstance(error, URLError) and not isinstance(error, HTTPError) else error
        transient = isinstance(cause, OSError | http.client.IncompleteRead)
        if isinstance(cause, HTTPError):
            transient = cause.code >= 500 or cause.code in (408, 429)  # a file that is not there, or not for us, remains so
            what = f"the server answered HTTP {cause.code} ({http.client.responses.get(cause.code, 'no known status')})"
            what += "; its redirect goes round in a circle, or not to http(s)" if cause.code < 400 else ""
        elif isinstance(cause, TimeoutError):
            what = f"no answer within {job.timeout_s:g} s"
        elif isinstance(cause, socket.gaierror):
            what = "the host name cannot be resolved (no network, or a misspelt host)"
        elif transient:
            what = getattr(cause, "strerror", None) or str(cause)
        else:
            what = "the address, the server's answer or its redirect is not valid HTTP(S)"
        job.fail(what, hint=_HINT_AGAIN if transient else _HINT_LOCAL, transient=transient)


class _Redirects(web.HTTPRedirectHandler):
    def http_error_302(self, req: web.Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage) -> Any:
        with fp:  # urllib leaves the answer open where its Location is not a URL
            return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _opener() -> web.OpenerDirector:
    """An opener for http and https alone: urllib's own adds file:, ftp: and data:, and a redirect can lead to ftp:."""
    opener = web.OpenerDirector()
    kinds = web.ProxyHandler, web.HTTPHandler, web.HTTPSHandler, web.UnknownHandler, _Redirects
    for kind in (*kinds, web.HTTPDefaultErrorHandler, web.HTTPErrorProcessor):
        opener.add_handler(kind())
    return opener


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"the download cache cannot be written: {error.filename or path}: {error.strerror or error}"
        raise OutputError(message, hint="free some space, or set MODELCRATE_CACHE to another folder that can be written") from error


@contextmanager
def _locked(job: _Job) -> Iterator[None]:
    with _disk(job.file):
        job.file.parent.mkdir(parents=True, exist_ok=True)
        file = job.beside(".lock").open("ab")
    with file:
        if not _try_lock(file):
            job.report(Noted(text=f"waiting for another process that downloads {job.shown}"))
            while not _try_lock(file):
                time.sleep(LOCK_POLL_S)
        yield


def _try_lock(file: IO[bytes]) -> bool:
    with _disk(Path(file.name)), suppress(BlockingIOError, PermissionError):
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file of ours; empty when it is missing or cut off, as after a crash."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}
