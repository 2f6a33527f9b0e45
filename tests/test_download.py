"""Downloads from a real server on loopback. ``sent`` is what it sent of bodies: more than the file is a waste."""

from __future__ import annotations

import hashlib
import os
import resource
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from web import Page, Web, gguf

from bridge.models import download
from bridge.models.download import ATTEMPTS, Remote
from bridge.models.store import PARTIAL, Partial
from protocol.errors import BridgeError

CONTENT = gguf(200_000)
OTHER = gguf(200_000, fill=1)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def remote(web: Web, path: str = "/m.gguf", **more: object) -> Remote:
    return Remote("the source", "m.gguf", web.url + path, **more)  # type: ignore[arg-type]


def bring(store: Path, origin: Remote, since: str | None = None) -> bytes:
    """What comes; that it comes as a whole and is counted right is checked here."""
    counts: list[tuple[int, int | None]] = []
    with Partial(store, origin.source) as partial:
        assert origin.bring(partial, lambda done, total: counts.append((done, total)), since)
        content = partial.path.read_bytes()
        assert partial.digest() == hashlib.sha256(content).hexdigest()
        assert partial.size == len(content)
    if counts:
        assert counts[-1][0] == len(content)
        assert counts[-1][1] in (len(content), None)
    return content


def failure(store: Path, origin: Remote) -> BridgeError:
    with Partial(store, origin.source) as partial, pytest.raises(BridgeError) as caught:
        origin.bring(partial, lambda done, total: None, None)
    return caught.value


def part(store: Path) -> bytes | None:
    files = list((store / PARTIAL).glob("*.part"))
    return files[0].read_bytes() if files else None


def test_a_file_comes_whole_in_one_request(web: Web, tmp_path: Path) -> None:
    web.pages["/m.gguf"] = Page(CONTENT)
    assert bring(tmp_path, remote(web)) == CONTENT
    assert [seen.status for seen in web.seen] == [200]


@pytest.mark.parametrize("cut", [0, 1, 3, 4, 5, 23, 24, 25, 1000, 16384, 100_000, len(CONTENT) - 1])
@pytest.mark.parametrize("chunked", [False, True])
def test_after_a_break_only_the_rest_is_fetched(web: Web, tmp_path: Path, cut: int, chunked: bool) -> None:
    web.pages["/m.gguf"] = Page(CONTENT, cuts=[cut], chunked=chunked)
    assert bring(tmp_path, remote(web)) == CONTENT
    of_use = cut >= len(b"GGUF")  # what is shorter may be anything, and is not kept
    assert web.sent == len(CONTENT) + (0 if of_use else cut)
    assert [seen.status for seen in web.seen] == [200, 206 if of_use else 200]


def test_a_file_of_unknown_length_leaves_some_of_the_disk(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "STRIDE", 50_000)
    web.pages["/m.gguf"] = Page(CONTENT, chunked=True)
    assert bring(tmp_path / "enough", remote(web)) == CONTENT
    monkeypatch.setattr(download, "RESERVE", 1 << 60)
    error = failure(tmp_path / "little", remote(web))
    assert (error.code, error.details["need"]) == ("pull_failed", 1 << 60)
    assert "does not tell its length" in error.message
    assert not part(tmp_path / "little")
    web.pages["/m.gguf"] = Page(CONTENT)
    assert bring(tmp_path / "little", remote(web)) == CONTENT, "where it is told it is known to fit"


def test_many_breaks_that_each_bring_something_are_no_failure(web: Web, tmp_path: Path) -> None:
    web.pages["/m.gguf"] = Page(CONTENT, cuts=[9_000] * (3 * ATTEMPTS))
    assert bring(tmp_path, remote(web)) == CONTENT
    assert web.sent == len(CONTENT)
    assert len(web.seen) == 3 * ATTEMPTS + 1


def test_breaks_that_bring_nothing_end_it_and_the_next_run_goes_on(web: Web, tmp_path: Path) -> None:
    web.pages["/m.gguf"] = page = Page(CONTENT, cuts=[70_000] + [0] * (ATTEMPTS - 1))
    error = failure(tmp_path, remote(web))
    assert error.code == "pull_failed"
    assert "the 70,000 bytes that came are kept" in error.message
    assert part(tmp_path) == CONTENT[:70_000]
    assert not page.cuts
    assert bring(tmp_path, remote(web)) == CONTENT
    assert web.sent == len(CONTENT)


@pytest.mark.parametrize("digest", [None, DIGEST])
def test_a_server_without_ranges_sends_all_of_it_again(web: Web, tmp_path: Path, digest: str | None) -> None:
    web.pages["/m.gguf"] = Page(CONTENT, cuts=[50_000], ranges=False)
    assert bring(tmp_path, remote(web, sha256=digest)) == CONTENT
    assert web.sent == len(CONTENT) + 50_000


def test_a_file_that_changed_meanwhile_begins_anew(web: Web, tmp_path: Path) -> None:
    web.pages["/m.gguf"] = Page(CONTENT, cuts=[50_000] + [0] * (ATTEMPTS - 1))
    failure(tmp_path, remote(web))
    web.pages["/m.gguf"] = Page(OTHER, etag='"two"')
    assert bring(tmp_path, remote(web)) == OTHER
    assert (web.seen[-1].headers["if-range"], web.seen[-1].status) == ('"one"', 200)


def test_a_file_that_became_shorter_begins_anew(web: Web, tmp_path: Path) -> None:
    web.pages["/m.gguf"] = Page(CONTENT, cuts=[150_000] + [0] * (ATTEMPTS - 1))
    failure(tmp_path, remote(web))
    web.pages["/m.gguf"] = Page(gguf(1000))  # with the same ETag, which is a lie
    assert bring(tmp_path, remote(web)) == gguf(1000)
    assert [seen.status for seen in web.seen[-2:]] == [416, 200]


def test_the_date_of_the_last_change_does_for_an_etag(web: Web, tmp_path: Path) -> None:
    date = "Sat, 21 Nov 2026 10:00:00 GMT"
    web.pages["/m.gguf"] = Page(CONTENT, etag='W/"weak"', modified=date, cuts=[50_000])
    assert bring(tmp_path, remote(web)) == CONTENT
    assert web.seen[-1].headers["if-range"] == date
    assert web.sent == len(CONTENT)


def test_without_either_it_begins_anew(web: Web, tmp_path: Path) -> None:
    web.pages["/m.gguf"] = Page(CONTENT, etag='W/"weak"', cuts=[50_000])
    assert bring(tmp_path, remote(web)) == CONTENT
    assert "range" not in web.seen[-1].headers
    assert web.sent == len(CONTENT) + 50_000


@pytest.mark.parametrize("etag", ['"\u00e9"', '"' + "x" * 600 + '"'])
def test_an_odd_etag_is_not_sent_back(web: Web, tmp_path: Path, etag: str) -> None:
    web.pages["/m.gguf"] = Page(CONTENT, etag=etag, cuts=[50_000])
    assert bring(tmp_path, remote(web)) == CONTENT
    assert "if-range" not in web.seen[-1].headers


def test_with_a_digest_known_beforehand_it_goes_on_whatever_the_etag(web: Web, tmp_path: Path) -> None:
    web.pages["/m.gguf"] = Page(CONTENT, etag=None, cuts=[50_000] + [0] * (ATTEMPTS - 1))
    failure(tmp_path, remote(web, sha256=DIGEST))
    web.pages["/m.gguf"] = Page(CONTENT, etag='"of another mirror"')
    assert bring(tmp_path, remote(web, sha256=DIGEST)) == CONTENT
    assert web.sent == len(CONTENT)


def test_what_came_for_another_digest_is_not_used(web: Web, tmp_path: Path) -> None:
    web.pages["/m.gguf"] = Page(OTHER, etag=None, cuts=[50_000] + [0] * (ATTEMPTS - 1))
    failure(tmp_path, remote(web, sha256="0" * 64))
    web.pages["/m.gguf"] = Page(CONTENT)
    assert bring(tmp_path, remote(web, sha256=DIGEST)) == CONTENT


def test_what_was_whole_when_the_process_ended_is_not_fetched_again(web: Web, tmp_path: Path) -> None:
    web.pages["/m.gguf"] = Page(CONTENT)
    bring(tmp_path, remote(web))
    assert bring(tmp_path, remote(web)) == CONTENT
    assert [seen.status for seen in web.seen] == [200, 304]
    web.pages["/m.gguf"] = Page(OTHER, etag='"two"')
    assert bring(tmp_path, remote(web)) == OTHER


def test_with_its_digest_known_nobody_is_asked_for_what_is_whole(web: Web, tmp_path: Path) -> None:
    web.pages["/m.gguf"] = Page(CONTENT)
    bring(tmp_path, remote(web, sha256=DIGEST))
    assert bring(tmp_path, remote(web, sha256=DIGEST)) == CONTENT
    assert len(web.seen) == 1


def test_another_range_than_was_asked_for_is_not_added(web: Web, tmp_path: Path) -> None:
    web.pages["/m.gguf"] = Page(CONTENT, cuts=[50_000], range_start=49_999)
    assert bring(tmp_path, remote(web)) == CONTENT
    assert [seen.status for seen in web.seen] == [200, 206, 200]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_server_in_trouble_is_asked_again(web: Web, tmp_path: Path, status: int) -> None:
    web.pages["/m.gguf"] = Page(CONTENT, statuses=[status, status])
    assert bring(tmp_path, remote(web)) == CONTENT
    assert [seen.status for seen in web.seen] == [status, status, 200]


def test_it_waits_as_long_as_the_server_says(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    web.pages["/m.gguf"] = Page(CONTENT, statuses=[503, 503], headers={"Retry-After": "7"})
    bring(tmp_path, remote(web))
    assert waits == [7.0, 7.0]


def test_the_waits_grow_and_are_bounded(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    monkeypatch.setattr(download, "BACKOFF", 8.0)
    web.pages["/m.gguf"] = Page(CONTENT, statuses=[500] * ATTEMPTS)
    assert failure(tmp_path, remote(web)).code == "pull_failed"
    assert waits == [8.0, 16.0, 30.0, 30.0]


@pytest.mark.parametrize(
    ("status", "code"),
    [(404, "not_found"), (410, "not_found"), (401, "forbidden"), (403, "forbidden"), (418, "pull_failed")],
)
def test_a_refusal_is_an_error_at_once(web: Web, tmp_path: Path, status: int, code: str) -> None:
    web.pages["/m.gguf"] = Page(CONTENT, statuses=[status] * ATTEMPTS)
    error = failure(tmp_path, remote(web))
    assert error.code == code
    assert f"HTTP {status}" in error.message
    assert len(web.seen) == 1
    assert part(tmp_path) is None


def test_a_web_page_is_refused_by_its_first_bytes(web: Web, tmp_path: Path) -> None:
    web.pages["/m.gguf"] = Page(b"<!doctype html><p>log in" + bytes(50_000_000))
    error = failure(tmp_path, remote(web))
    assert web.sent < 20_000_000  # no more than sockets buffer
    assert error.code == "bad_model"
    assert "it begins with b'<!doctype html" in error.message
    assert part(tmp_path) is None


def test_a_web_page_does_not_cost_what_came_before(web: Web, tmp_path: Path) -> None:
    web.pages["/m.gguf"] = Page(CONTENT, cuts=[150_000] + [0] * (ATTEMPTS - 1))
    failure(tmp_path, remote(web, size=len(CONTENT)))
    for page in (b"<html>log in</html>" + bytes(100), bytes(len(CONTENT)), b"<"):
        web.pages["/m.gguf"] = Page(page, etag=None)
        assert failure(tmp_path, remote(web, size=len(CONTENT))).code == "bad_model"
    web.pages["/m.gguf"] = Page(CONTENT)
    web.seen.clear()
    assert bring(tmp_path, remote(web, size=len(CONTENT))) == CONTENT
    assert web.sent == len(CONTENT) - 150_000


def test_the_first_bytes_may_come_one_by_one(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("web.PIECE", 1)
    web.pages["/m.gguf"] = Page(CONTENT[:300])
    assert bring(tmp_path, remote(web)) == CONTENT[:300]
    web.pages["/n.gguf"] = Page(b"GGUX" + CONTENT[4:300])
    assert failure(tmp_path, remote(web, "/n.gguf", sha256="0" * 64)).code == "bad_model"


@pytest.mark.parametrize("size", [0, 3, 4, 23])
@pytest.mark.parametrize("chunked", [False, True])
def test_too_few_bytes_are_no_model(web: Web, tmp_path: Path, size: int, chunked: bool) -> None:
    web.pages["/m.gguf"] = Page(CONTENT[:size], chunked=chunked)
    error = failure(tmp_path, remote(web))
    assert error.code == "bad_model"
    assert f"{size} bytes, too few" in error.message


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [len(CONTENT) - 1, len(CONTENT) + 1])
def test_another_length_than_is_known_is_refused(web: Web, tmp_path: Path, size: int, chunked: bool) -> None:
    web.pages["/m.gguf"] = Page(CONTENT, chunked=chunked)
    error = failure(tmp_path, remote(web, size=size))
    if chunked and size > len(CONTENT):
        assert error.code == "pull_failed"  # it may still come
        assert f"ended at {len(CONTENT):,} of {size:,}" in error.message
    else:
        assert error.code == "bad_model"
        assert f"expected {size:,}" in error.message


def test_a_content_length_that_is_never_reached_is_a_break(web: Web, tmp_path: Path) -> None:
    web.pages["/m.gguf"] = Page(CONTENT, length=len(CONTENT) + 10)
    error = failure(tmp_path, remote(web))
    assert error.code == "pull_failed"
    came = part(tmp_path)
    assert came is not None
    assert error.details == {"kept": len(came)}


def test_a_compressed_body_is_refused(web: Web, tmp_path: Path) -> None:
    web.pages["/m.gguf"] = Page(CONTENT, headers={"Content-Encoding": "gzip"})
    assert "insists on sending it as gzip" in failure(tmp_path, remote(web)).message
    assert web.seen[0].headers["accept-encoding"] == "identity"


@dataclass
class Run:
    """What the server does while one run lasts."""

    version: int
    cuts: list[int]
    statuses: list[int]
    ranges: bool
    chunked: bool


RUNS = st.lists(
    st.builds(
        Run,
        st.integers(0, 2),
        st.lists(st.integers(0, 40_000), max_size=4),
        st.lists(st.sampled_from([200, 404, 416, 500, 503]), max_size=3),
        st.booleans(),
        st.booleans(),
    ),
    max_size=3,
)
VERSIONS = [gguf(30_000, fill=1), gguf(30_000, fill=2), gguf(20_000, fill=3)]


@given(runs=RUNS, pinned=st.booleans())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_happens_before_the_last_run_brings_the_last_version(
    web: Web, tmp_path_factory: pytest.TempPathFactory, runs: list[Run], pinned: bool
) -> None:
    """``pinned``: its digest is known beforehand, so that it never changes."""
    store = tmp_path_factory.mktemp("store")
    for run in [*runs, Run(2, [], [], True, False)]:  # the last one is untroubled
        version = 2 if pinned else run.version
        content, statuses = VERSIONS[version], [status for status in run.statuses if status != 200]
        etag = None if pinned else f'"{version}"'
        web.pages["/m.gguf"] = Page(content, etag, None, run.ranges, list(run.cuts), statuses, chunked=run.chunked)
        origin = remote(web, sha256=hashlib.sha256(content).hexdigest() if pinned else None)
        try:
            assert bring(store, origin) == content
        except BridgeError as error:
            came, known = part(store) or b"", VERSIONS[2:] if pinned else VERSIONS
            if error.code not in ("pull_failed", "not_found") or not any(one.startswith(came) for one in known):
                raise
    assert part(store) == VERSIONS[2]


# -- redirects -----------------------------------------------------------------------------------------------------


def test_redirects_are_followed_with_the_range(web: Web, tmp_path: Path) -> None:
    web.pages["/there"] = Page(location="/m.gguf")
    web.pages["/m.gguf"] = Page(CONTENT, cuts=[50_000])
    assert bring(tmp_path, remote(web, "/there")) == CONTENT
    assert web.sent == len(CONTENT)


def test_a_circle_of_redirects_ends(web: Web, tmp_path: Path) -> None:
    web.pages["/m.gguf"] = Page(location="/m.gguf")
    assert failure(tmp_path, remote(web)).code == "pull_failed"
    assert len(web.seen) == download.REDIRECTS + 1


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/m.gguf", "gopher://127.0.0.1/"])
def test_a_redirect_elsewhere_than_to_http_is_an_error(web: Web, tmp_path: Path, location: str) -> None:
    web.pages["/m.gguf"] = Page(location=location)
    assert failure(tmp_path, remote(web)).code == "pull_failed"
    assert len(web.seen) == 1


def test_a_login_goes_to_its_own_host_alone(web: Web, tmp_path: Path) -> None:
    headers = {"Authorization": "Bearer secret"}
    with Web().serving() as other:
        other.pages["/m.gguf"] = Page(CONTENT)
        web.pages["/m.gguf"] = Page(location=f"{other.url}/m.gguf")
        web.pages["/own"] = Page(location="/m.gguf")
        assert bring(tmp_path, remote(web, "/own", headers=headers)) == CONTENT
        assert [seen.headers.get("authorization") for seen in web.seen] == ["Bearer secret"] * 2
        assert [seen.headers.get("authorization") for seen in other.seen] == [None]


def test_https_never_becomes_http() -> None:
    refusal = pytest.raises(download.httpx2.UnsupportedProtocol, match="from https to http")
    with download.make_client("https://127.0.0.1:1/m.gguf") as client, refusal:
        client.get("http://127.0.0.1:1/m.gguf")


@pytest.mark.parametrize("location", ["http://[::1", "http://127.0.0.1:99999/", "http://\u00e9 \u00e9/", "//"])
def test_a_redirect_to_nowhere_is_an_error(web: Web, tmp_path: Path, location: str) -> None:
    web.pages["/m.gguf"] = Page(location=location)
    assert failure(tmp_path, remote(web)).code == "pull_failed"


# -- what cannot be reached ----------------------------------------------------------------------------------------


def test_nobody_there_is_pull_failed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/m.gguf"
        error = failure(tmp_path, Remote("the source", "m.gguf", url))
    assert capfd.readouterr().err == ""  # it says so at once
    assert error.code == "pull_failed"
    assert "refused" in error.message
    assert "kept" not in error.message


@pytest.mark.parametrize("url", ["http://[::1/m.gguf", "http://127.0.0.1:99999/m.gguf", "http://\u2603\u200b/m.gguf"])
def test_what_is_no_address_is_pull_failed(tmp_path: Path, url: str) -> None:
    assert failure(tmp_path, Remote("the source", "m.gguf", url)).code == "pull_failed"


def test_a_stall_is_a_break(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT", download.httpx2.Timeout(0.1))
    web.pages["/m.gguf"] = Page(CONTENT, gate=threading.Event())  # it stalls halfway, then halfway of the rest ...
    assert bring(tmp_path, remote(web)) == CONTENT
    assert web.sent == len(CONTENT)
    assert len(web.seen) > 2


@pytest.mark.parametrize(("since", "header"), [('"one"', "if-none-match"), ("a date", "if-modified-since")])
def test_what_has_not_changed_is_not_sent(web: Web, tmp_path: Path, since: str, header: str) -> None:
    web.pages["/m.gguf"] = Page(CONTENT, statuses=[304])
    with Partial(tmp_path, "the source") as partial:
        assert not remote(web).bring(partial, lambda done, total: None, since)
    assert web.seen[0].headers[header] == since
    assert web.sent == 0


# -- the disk ------------------------------------------------------------------------------------------------------


def test_no_room_is_known_before_anything_is_written(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs

    def little(path: Path) -> os.statvfs_result:
        values = list(real(path))
        values[1], values[4] = 1000, 150  # f_frsize and f_bavail: 150,000 bytes
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", little)
    web.pages["/m.gguf"] = Page(CONTENT, gate=threading.Event())
    error = failure(tmp_path, remote(web))
    assert (error.code, error.details) == ("pull_failed", {"need": len(CONTENT), "have": 150_000})
    assert part(tmp_path) is None


PROGRAM = """
import resource, sys
from pathlib import Path
from bridge.models.download import Remote
from bridge.models.store import Partial, is_full
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with Partial(Path(sys.argv[2]), "the source") as partial:
        Remote("the source", "m.gguf", sys.argv[1]).bring(partial, lambda done, total: None, None)
except OSError as error:
    print(is_full(error))
"""


def test_what_came_before_there_was_no_room_is_kept(web: Web, tmp_path: Path) -> None:
    """A limit on the process: the write that passes it is cut short, as on a full disk, and the next one fails."""
    web.pages["/m.gguf"] = Page(CONTENT)
    command = [sys.executable, "-c", PROGRAM, f"{web.url}/m.gguf", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n", done.stderr
    assert part(tmp_path) == CONTENT[:100_000]
    web.seen.clear()
    assert bring(tmp_path, remote(web)) == CONTENT
    assert web.sent == len(CONTENT) - 100_000
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
