"""Downloads against a real HTTP server on this machine that misbehaves in the ways that servers do."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from modelcrate_bundle.errors import ConfigError, DownloadError, OutputError
from modelcrate_converter import download as module
from modelcrate_converter.download import default_cache_dir, download, expected_sha256_prefix
from modelcrate_converter.progress import Advanced, Event, Noted

CONTENT = bytes(range(256)) * 1200
OTHER = CONTENT[::-1]
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Site:
    """What the server does, and what it was asked; a test changes the fields between calls.

    Attributes:
        statuses: answered instead of the file, one per request, before it behaves.
        drops: bytes after which it hangs up, one per request; None sends all.
    """

    port: int = 0
    content: bytes = CONTENT
    etag: str | None = '"one"'
    last_modified: str | None = None
    statuses: list[int] = field(default_factory=list)
    drops: list[int | None] = field(default_factory=list)
    location: str = ""
    ranges: bool = True
    honours_if_range: bool = True
    declared_bytes: int | None = None
    chunked: bool = False
    content_range: str = ""
    content_encoding: str = ""
    pause_s: float = 0.0
    requests: list[dict[str, str]] = field(default_factory=list)

    def url(self, path: str = "/net.pth") -> str:
        return f"http://127.0.0.1:{self.port}{path}"


class Handler(BaseHTTPRequestHandler):
    site: Site

    def log_message(self, format: str, *args: object) -> None:
        del format, args

    def do_GET(self) -> None:
        site = self.site
        site.requests.append({"path": self.path, **{key.lower(): value for key, value in self.headers.items()}})
        status = site.statuses.pop(0) if site.statuses else 0
        if self.path.startswith("/moved"):
            status = 302
        if status:
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", site.location)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = self.range_start()
        if start and start >= len(site.content):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_file(site.content[start:], start)

    def range_start(self) -> int:
        asked, condition = self.headers.get("Range"), self.headers.get("If-Range")
        if not asked or not self.site.ranges:
            return 0
        if self.site.honours_if_range and condition not in (None, self.site.etag, self.site.last_modified):
            return 0
        return int(asked.removeprefix("bytes=").removesuffix("-"))

    def send_file(self, body: bytes, start: int) -> None:
        site = self.site
        self.send_response(206 if start else 200)
        if start:
            whole = len(site.content)
            self.send_header("Content-Range", site.content_range or f"bytes {start}-{whole - 1}/{whole}")
        for name, value in (("ETag", site.etag), ("Last-Modified", site.last_modified), ("Content-Encoding", site.content_encoding)):
            if value:
                self.send_header(name, value)
        keep = site.drops.pop(0) if site.drops else None
        if site.chunked:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(body), body))
            self.wfile.write(b"" if keep is not None else b"0\r\n\r\n")
            return
        self.send_header("Content-Length", str(site.declared_bytes or len(body)))
        self.end_headers()
        self.wfile.flush()
        time.sleep(site.pause_s)
        self.wfile.write(body[:keep])


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(module, "BACKOFF_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(module, "LOCK_POLL_S", 0.01)
    found = Site()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("SiteHandler", (Handler,), {"site": found})) as server:
        found.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        server.shutdown()
        thread.join()


def only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACKOFF_S", ())


def files_in(cache: Path) -> set[str]:
    return {path.name for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"}


def nobody_holds_the_lock(url: str, cache: Path) -> bool:
    """A download that finds the lock taken reports that it waits."""
    events: list[Event] = []
    download(url, cache_dir=cache, report=events.append)
    return not any(isinstance(event, Noted) and "waiting" in event.text for event in events)


def test_a_file_is_fetched_once_and_then_comes_from_the_cache(site: Site, tmp_path: Path) -> None:
    url = site.url("/models/net.pth")
    path = download(url, cache_dir=tmp_path / "new" / "cache")
    assert path.read_bytes() == CONTENT
    assert path.relative_to(tmp_path / "new" / "cache").parts == (hashlib.sha256(url.encode()).hexdigest()[:16], "net.pth")
    assert json.loads((path.parent / "net.pth.json").read_text()) == {"url": url, "sha256": DIGEST, "bytes": len(CONTENT)}
    assert files_in(tmp_path) == {"net.pth", "net.pth.json"}
    assert download(url, cache_dir=tmp_path / "new" / "cache", sha256=DIGEST.upper()) == path
    assert len(site.requests) == 1
    assert site.requests[0]["user-agent"] == "modelcrate"


def test_a_file_without_a_declared_length_is_taken_to_its_end(site: Site, tmp_path: Path) -> None:
    site.chunked = True
    events: list[Event] = []
    assert download(site.url(), cache_dir=tmp_path, report=events.append).read_bytes() == CONTENT
    assert all(isinstance(event, Advanced) and event.total is None for event in events)


def test_an_empty_file_is_a_file(site: Site, tmp_path: Path) -> None:
    site.content = b""
    assert download(site.url(), cache_dir=tmp_path).read_bytes() == b""
    assert download(site.url(), cache_dir=tmp_path, offline=True).read_bytes() == b""


@pytest.mark.parametrize("damage", [CONTENT[:-1], OTHER], ids=["cut off", "same size"])
def test_a_damaged_cached_file_is_fetched_again(site: Site, tmp_path: Path, damage: bytes) -> None:
    path = download(site.url(), cache_dir=tmp_path)
    path.write_bytes(damage)
    assert download(site.url(), cache_dir=tmp_path).read_bytes() == CONTENT
    assert len(site.requests) == 2


@pytest.mark.parametrize("sidecar", [None, "", "[]", "{", '{"sha256": 5, "bytes": "x"}'])
def test_a_file_whose_sidecar_was_lost_is_not_trusted(site: Site, tmp_path: Path, sidecar: str | None) -> None:
    path = download(site.url(), cache_dir=tmp_path)
    beside = path.with_name("net.pth.json")
    beside.unlink() if sidecar is None else beside.write_text(sidecar)
    assert download(site.url(), cache_dir=tmp_path).read_bytes() == CONTENT
    assert len(site.requests) == 2


def test_a_connection_that_breaks_is_continued_where_it_stopped(site: Site, tmp_path: Path) -> None:
    site.drops = [100_000, 50_000]
    events: list[Event] = []
    assert download(site.url(), cache_dir=tmp_path, sha256=DIGEST, report=events.append).read_bytes() == CONTENT
    assert [request.get("range") for request in site.requests] == [None, "bytes=100000-", "bytes=150000-"]
    assert site.requests[1]["if-range"] == '"one"'
    notes = [event.text for event in events if isinstance(event, Noted)]
    assert [note.partition("; ")[2] for note in notes] == ["trying again (1 of 3)", "trying again (2 of 3)"]


def test_a_file_that_ends_early_is_told_and_the_next_call_continues(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_once(monkeypatch)
    site.drops = [1000]
    with pytest.raises(DownloadError, match=f"expected {len(CONTENT)} bytes, found 1000") as caught:
        download(site.url(), cache_dir=tmp_path)
    assert "again to continue" in caught.value.hint
    assert files_in(tmp_path) == {"net.pth.part", "net.pth.part.json"}
    assert download(site.url(), cache_dir=tmp_path).read_bytes() == CONTENT
    assert site.requests[-1]["range"] == "bytes=1000-"
    assert files_in(tmp_path) == {"net.pth", "net.pth.json"}


def test_a_chunked_answer_that_breaks_is_not_taken_for_the_whole(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_once(monkeypatch)
    site.chunked, site.drops = True, [0]
    with pytest.raises(DownloadError, match="IncompleteRead"):
        download(site.url(), cache_dir=tmp_path)
    assert "net.pth" not in files_in(tmp_path)


def test_a_server_that_lies_about_the_length_is_given_up_in_the_end(site: Site, tmp_path: Path) -> None:
    site.declared_bytes, site.ranges = len(CONTENT) + 7, False
    with pytest.raises(DownloadError, match=f"expected {len(CONTENT) + 7} bytes, found {len(CONTENT)}"):
        download(site.url(), cache_dir=tmp_path)
    assert len(site.requests) == 4


@dataclass(frozen=True)
class Change:
    name: str
    apply: Callable[[Site], None]


def changed(name: str, **fields: object) -> Change:
    def apply(site: Site) -> None:
        for key, value in fields.items():
            setattr(site, key, value)

    return Change(name, apply)


@pytest.mark.parametrize(
    "change",
    [
        changed("another file, another ETag", content=OTHER, etag='"two"'),
        changed("If-Range is ignored", content=OTHER, etag='"two"', honours_if_range=False),
        changed("Range is ignored", content=OTHER, ranges=False),
        changed("another length under the same ETag", content=OTHER[:-5], honours_if_range=False),
        changed("shorter than the part", content=OTHER[:500]),
        changed("the part starts elsewhere", content=OTHER, content_range="bytes 7-99/307200"),
        changed("nonsense in Content-Range", content=OTHER, content_range="lines 1-2"),
    ],
    ids=lambda change: change.name,
)
def test_a_part_of_what_may_be_another_file_is_never_continued(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    only_once(monkeypatch)
    site.drops = [1000]
    with pytest.raises(DownloadError, match="ended early"):
        download(site.url(), cache_dir=tmp_path)
    change.apply(site)
    assert download(site.url(), cache_dir=tmp_path).read_bytes() == site.content


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_validator_the_download_starts_anew(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, etag: str | None
) -> None:
    only_once(monkeypatch)
    site.etag, site.drops = etag, [1000]
    with pytest.raises(DownloadError, match="ended early"):
        download(site.url(), cache_dir=tmp_path)
    assert download(site.url(), cache_dir=tmp_path).read_bytes() == CONTENT
    assert "range" not in site.requests[-1]


def test_the_date_of_a_file_serves_where_it_has_no_tag(site: Site, tmp_path: Path) -> None:
    site.etag, site.last_modified, site.drops = None, "Thu, 26 Jan 2023 08:00:00 GMT", [1000]
    assert download(site.url(), cache_dir=tmp_path).read_bytes() == CONTENT
    assert site.requests[-1]["if-range"] == site.last_modified


def test_a_wrong_hash_is_told_and_nothing_is_kept(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=f"expected SHA-256 {'0' * 64}, found {DIGEST}"):
        download(site.url(), cache_dir=tmp_path, sha256="0" * 64)
    assert files_in(tmp_path) == set()


def test_a_wrong_hash_leaves_the_cached_file_that_others_use(site: Site, tmp_path: Path) -> None:
    path = download(site.url(), cache_dir=tmp_path, sha256=DIGEST[:8])
    with pytest.raises(DownloadError, match="expected SHA-256 00000000, found"):
        download(site.url(), cache_dir=tmp_path, sha256="00000000")
    assert download(site.url(), cache_dir=tmp_path, offline=True) == path


def test_a_file_that_was_replaced_upstream_is_fetched_when_its_hash_is_asked_for(site: Site, tmp_path: Path) -> None:
    download(site.url(), cache_dir=tmp_path)
    site.content = OTHER
    assert download(site.url(), cache_dir=tmp_path, sha256=hashlib.sha256(OTHER).hexdigest()).read_bytes() == OTHER


def test_the_hash_in_the_name_is_checked(site: Site, tmp_path: Path) -> None:
    assert download(site.url(f"/net-{DIGEST[:8]}_20230126.pth"), cache_dir=tmp_path).read_bytes() == CONTENT
    with pytest.raises(DownloadError, match="expected SHA-256 cfc8f33d"):
        download(site.url("/net-cfc8f33d_20230126.pth"), cache_dir=tmp_path)
    assert download(site.url("/net-cfc8f33d_20230126.pth"), cache_dir=tmp_path, sha256=DIGEST).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("rtmpose-tiny_simcc-aic-coco_pt-aic-coco_420e-256x192-cfc8f33d_20230126.pth", "cfc8f33d"),
        ("resnet50-0676ba61.pth?download=true#top", "0676ba61"),
        ("resnet50_8xb32_in1k_20210831-ea4938fc.pth", "ea4938fc"),
        ("net%2Dcfc8f33d.safetensors", "cfc8f33d"),
        ("net-20230126_20230127.zip", "20230126"),
        ("net-20230126.pth", None),
        ("net-12345678.onnx", "12345678"),
        ("net-cfc8f33.pth", None),
        ("net_cfc8f33d.pth", None),
        ("net-cfc8f33d.tar", None),
        ("onnx_sdk/rtmpose-m_simcc-body7_pt-body7_420e-256x192-e48f03d0_20230504.zip", None),
        ("", None),
    ],
)
def test_expected_sha256_prefix_reads_published_names(name: str, prefix: str | None) -> None:
    assert expected_sha256_prefix(f"https://download.openmmlab.com/mmpose/{name}") == prefix


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("file:///etc/passwd", "found scheme file"),
        ("ftp://example.org/net.pth", "found scheme ftp"),
        ("data:,net", "found scheme none"),
        ("net.pth", "found scheme none"),
        ("http:///net.pth", "found scheme http"),
        ("http://[::1/net.pth", "found scheme http"),
        ("http://example.org:port/net.pth", "found scheme http"),
        ("http://example.org/a b.pth", "printable ASCII"),
        ("http://example.org/\r\nX-Other: 1", "printable ASCII"),
        ("http://example.org/größe.pth", "printable ASCII"),
    ],
)
def test_what_is_not_a_web_address_is_refused(url: str, found: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=found):
        download(url, cache_dir=tmp_path)


@pytest.mark.parametrize("sha256", ["", "cfc8f33", "cfc8f33g", "0" * 65])
def test_a_hash_that_is_none_is_refused(sha256: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="8 to 64 hex digits"):
        download("http://127.0.0.1/net.pth", cache_dir=tmp_path, sha256=sha256)


def test_credentials_are_sent_but_never_shown_nor_stored_nor_passed_on(site: Site, tmp_path: Path) -> None:
    url = f"http://anna:s%20cret@127.0.0.1:{site.port}/moved?token=t0ken"
    site.location = site.url("/net.pth")
    path = download(url, cache_dir=tmp_path)
    assert path.read_bytes() == CONTENT
    assert site.requests[0]["authorization"] == "Basic YW5uYTpzIGNyZXQ="
    assert site.requests[0]["path"] == "/moved?token=t0ken"
    assert "authorization" not in site.requests[1]
    assert (path.parent / "moved.json").read_text().count("127.0.0.1") == 1
    site.statuses = [404]
    with pytest.raises(DownloadError, match="HTTP 404") as caught:
        download(url.replace("/moved", "/gone"), cache_dir=tmp_path)
    texts = [str(caught.value), caught.value.hint, *(file.read_text() for file in tmp_path.rglob("*.json"))]
    assert not any(secret in text for text in texts for secret in ("anna", "cret", "t0ken"))


@pytest.mark.parametrize(
    "location",
    ["file:///etc/passwd", "ftp://127.0.0.1/net.pth", "data:,net", "http://anna:secret@127.0.0.1/", "http://[::1/", "/moved"],
)
def test_a_redirect_to_anything_but_the_web_is_refused(site: Site, tmp_path: Path, location: str) -> None:
    site.location = location
    with pytest.raises(DownloadError, match="redirect") as caught:
        download(site.url("/moved"), cache_dir=tmp_path)
    assert "secret" not in str(caught.value)
    assert caught.value.hint == "download it elsewhere and give its path"


def test_a_redirect_to_the_web_is_followed_with_its_range(site: Site, tmp_path: Path) -> None:
    site.location, site.drops = "/net.pth", [1000]
    path = download(site.url("/moved"), cache_dir=tmp_path)
    assert (path.name, path.read_bytes()) == ("moved", CONTENT)
    assert site.requests[-1]["range"] == "bytes=1000-"


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (403, 1), (416, 1), (500, 4), (503, 4), (429, 4)])
def test_only_errors_that_may_pass_are_tried_again(site: Site, tmp_path: Path, status: int, requests: int) -> None:
    site.statuses = [status] * 4
    with pytest.raises(DownloadError, match=rf"http://127\.0\.0\.1:\d+/net\.pth: the server answered HTTP {status} \(") as caught:
        download(site.url(), cache_dir=tmp_path)
    assert len(site.requests) == requests
    assert "download it elsewhere and give its path" in caught.value.hint


def test_a_server_that_recovers_is_forgiven(site: Site, tmp_path: Path) -> None:
    site.statuses = [500, 503]
    assert download(site.url(), cache_dir=tmp_path).read_bytes() == CONTENT


def test_a_server_that_has_nothing_but_parts_is_given_up(site: Site, tmp_path: Path) -> None:
    site.statuses = [206]
    with pytest.raises(DownloadError, match="neither the whole file"):
        download(site.url(), cache_dir=tmp_path)


def test_compressed_answers_are_refused_since_they_are_not_the_file(site: Site, tmp_path: Path) -> None:
    site.content_encoding = "gzip"
    with pytest.raises(DownloadError, match="the whole file as it is"):
        download(site.url(), cache_dir=tmp_path)


def test_a_silent_server_is_a_download_error(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_once(monkeypatch)
    site.pause_s = 0.15
    with pytest.raises(DownloadError, match=r"no answer within 0\.05 s"):
        download(site.url(), cache_dir=tmp_path, timeout_s=0.05)


def test_a_port_where_nobody_listens_is_a_download_error(site: Site, tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        free_port = server.server_address[1]
    assert free_port != site.port
    with pytest.raises(DownloadError, match=f"127.0.0.1:{free_port}/net.pth: .*refused") as caught:
        download(f"http://127.0.0.1:{free_port}/net.pth", cache_dir=tmp_path)
    assert "give its path" in caught.value.hint


@pytest.mark.parametrize("host", ["a" * 64 + ".invalid", "no..host"])
def test_a_host_that_cannot_exist_is_a_download_error(site: Site, tmp_path: Path, host: str) -> None:
    del site
    with pytest.raises(DownloadError, match=host):
        download(f"http://{host}/net.pth", cache_dir=tmp_path)


@pytest.mark.parametrize("chunked", [False, True], ids=["declared", "found out on the way"])
def test_a_file_over_the_limit_is_refused(site: Site, tmp_path: Path, chunked: bool) -> None:
    site.chunked = chunked
    with pytest.raises(DownloadError, match="too long: expected at most 1000 bytes, found"):
        download(site.url(), cache_dir=tmp_path, max_bytes=1000)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.part")) == 0
    assert download(site.url(), cache_dir=tmp_path, max_bytes=len(CONTENT)).read_bytes() == CONTENT


def test_a_cache_that_cannot_be_made_is_an_output_error(site: Site, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written") as caught:
        download(site.url(), cache_dir=blocked)
    assert "MODELCRATE_CACHE" in caught.value.hint
    assert site.requests == []


@pytest.mark.skipif(sys.platform == "win32", reason="only POSIX can limit the size of a file")
def test_a_disk_that_takes_no_more_is_an_output_error(site: Site, tmp_path: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot be written.*too large") as caught:
            download(site.url(), cache_dir=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "free some space" in caught.value.hint
    assert "net.pth" not in files_in(tmp_path)
    assert download(site.url(), cache_dir=tmp_path).read_bytes() == CONTENT


def test_offline_serves_the_cache_and_never_asks(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"net\.pth: not in the cache.*and --offline is set") as caught:
        download(site.url(), cache_dir=tmp_path, offline=True)
    assert "without --offline" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
    path = download(site.url(), cache_dir=tmp_path)
    assert download(site.url(), cache_dir=tmp_path, offline=True, sha256=DIGEST) == path
    with pytest.raises(DownloadError, match=f"not in the cache: expected SHA-256 00000000, found {DIGEST}"):
        download(site.url(), cache_dir=tmp_path, offline=True, sha256="00000000")
    path.write_bytes(OTHER)
    with pytest.raises(DownloadError, match="not in the cache: .*damaged"):
        download(site.url(), cache_dir=tmp_path, offline=True)
    assert len(site.requests) == 1


def test_progress_has_a_first_and_a_last_event_and_little_between(site: Site, tmp_path: Path) -> None:
    events: list[Event] = []
    download(site.url(), cache_dir=tmp_path, report=events.append)
    steps = [event for event in events if isinstance(event, Advanced)]
    assert steps == events
    assert steps[0] == Advanced(name="net.pth", done=0, total=len(CONTENT), unit="bytes")
    assert steps[-1] == Advanced(name="net.pth", done=len(CONTENT), total=len(CONTENT), unit="bytes")
    assert [step.done for step in steps] == sorted(step.done for step in steps)


def test_ctrl_c_keeps_what_came_and_holds_no_lock(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REPORT_EVERY_S", 0.0)

    def interrupt(event: Event) -> None:
        if isinstance(event, Advanced) and event.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(site.url(), cache_dir=tmp_path, report=interrupt)
    (part,) = tmp_path.rglob("*.part")
    kept_bytes = part.stat().st_size
    assert kept_bytes > 0
    if kept_bytes == len(CONTENT):
        part.write_bytes(CONTENT[:-1])
    assert nobody_holds_the_lock(site.url(), tmp_path)
    assert "range" in site.requests[-1]


def test_callers_at_the_same_time_download_once(site: Site, tmp_path: Path) -> None:
    site.pause_s = 0.1
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(download(site.url(), cache_dir=tmp_path).read_bytes())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 4
    assert len(site.requests) == 1
    assert files_in(tmp_path) == {"net.pth", "net.pth.json"}


def test_a_lock_file_that_a_dead_process_left_is_no_hindrance(site: Site, tmp_path: Path) -> None:
    path = download(site.url(), cache_dir=tmp_path)
    path.unlink()
    assert path.with_name("net.pth.lock").is_file()
    assert nobody_holds_the_lock(site.url(), tmp_path)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/", "download"),
        ("/..", "download"),
        ("/a/.hidden.pth", "hidden.pth"),
        ("/..%2f..%2fetc%2Fpasswd", "_.._etc_passwd"),
        ("/n%C3%A9t%00%0A.pth", "n_t__.pth"),
        ("/c%3A%5Cnet.pth", "c__net.pth"),
        ("/" + "x" * 300 + "-cfc8.pth", "x" * 111 + "-cfc8.pth"),
    ],
)
def test_names_from_urls_stay_inside_the_cache(site: Site, tmp_path: Path, path: str, name: str) -> None:
    found = download(site.url(path), cache_dir=tmp_path)
    assert found.name == name
    assert found.resolve().parent.parent == tmp_path.resolve()


@pytest.mark.skipif(sys.platform == "win32", reason="XDG folders are not for Windows")
def test_default_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("MODELCRATE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "modelcrate"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache_dir() == tmp_path / ".cache" / "modelcrate"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "modelcrate"
    monkeypatch.setenv("MODELCRATE_CACHE", "~/mine")
    assert default_cache_dir() == tmp_path / "mine"
