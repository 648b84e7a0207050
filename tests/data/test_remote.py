"""Remote tars, from a real server that cuts, lies, fails and forgets, to the stream that reads them."""

import hashlib
import http.server
import json
import multiprocessing
import os
import threading
from collections import Counter
from pathlib import Path

import pytest
from test_shards import pairs, write

from anymal.config.schema import DatasetConfig
from anymal.data import listing, manifest, remote, shards
from anymal.data.remote import Remote
from anymal.data.stream import merge_bookmarks
from anymal.errors import UserError
from stores import Line
from streams import batches, folder, samples, stream


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder and counts what it is asked for. `odd` names what goes wrong, by file name."""

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.asked, self.ranges, self.odd = root, Counter(), [], {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        name = self.path.split("?")[0].lstrip("/")
        self.server.asked[name] += 1
        odd, file = self.server.odd.get(name, {}), self.server.root / name
        if "to" in odd:
            self.send_response(302)
            self.send_header("Location", odd["to"])
            self.end_headers()
            return
        failing = odd.get("status") if self.server.asked[name] <= odd.get("times", 1) else None
        if failing or not file.is_file():
            self.send_error(failing or 404)
            return
        data, start = file.read_bytes(), 0
        tag = f'"{hashlib.sha256(data).hexdigest()}"'
        asked = self.headers.get("Range")
        if asked and not odd.get("no_range") and self.headers["If-Range"] == tag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            self.server.ranges.append(start)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start + odd.get('shift', 0)}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        if not odd.get("no_tag"):
            self.send_header("ETag", tag)
            self.send_header("Last-Modified", "Mon, 02 Feb 2026 10:00:00 GMT")
        self.send_header("Content-Length", str(len(data) - start + odd.get("longer", 0)))
        self.end_headers()
        cut = odd.get("cut") if self.server.asked[name] <= odd.get("times", 1) else None
        self.wfile.write(data[start : start + cut] if cut else data[start:])
        if "then" in odd:
            file.write_bytes(odd.pop("then"))


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF", 0.001)
    (tmp_path / "served").mkdir()
    with Server(tmp_path / "served") as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


@pytest.fixture
def tar(server):
    """A served tar of 20 samples."""
    return write(server.root / "a.tar", pairs(20))


def fetched(server, tmp_path, name="a.tar", **options) -> Remote:
    made = Remote(url=f"{server.url}/{name}", cache=str(tmp_path / "cache"), **options)
    made.fetch()
    return made


@pytest.mark.parametrize(
    "odd, ranges",
    [
        ({}, 0),
        ({"cut": 5000}, 1),
        ({"cut": 5000, "times": 3}, 3),
        ({"cut": 5000, "no_range": True}, 0),
        ({"cut": 5000, "no_tag": True}, 0),  # nothing says that the rest would be of the same file
        ({"cut": 5000, "shift": 1}, 1),  # the server sends another range than it was asked for
        ({"status": 503, "times": 4}, 0),
    ],
)
def test_download_gets_every_byte(server, tar, tmp_path, odd, ranges):
    server.odd["a.tar"] = odd
    made = fetched(server, tmp_path)
    assert Path(made.path).read_bytes() == tar.read_bytes()
    assert len(server.ranges) == ranges
    asked = server.asked["a.tar"]
    made.fetch()
    assert server.asked["a.tar"] == asked  # it is here
    assert sorted(p.name for p in Path(made.path).parent.iterdir()) == ["a.tar", "a.tar.lock"]


def test_a_file_that_changes_between_two_tries_is_not_mixed(server, tar, tmp_path):
    other = tar.read_bytes()[::-1]
    server.odd["a.tar"] = {"cut": 5000, "then": other}
    assert Path(fetched(server, tmp_path).path).read_bytes() == other
    assert server.ranges == []


@pytest.mark.parametrize(
    "odd, says, asked",
    [
        ({"longer": 10}, "tried 5 times: {size:,} of {longer:,} bytes came", 5),
        ({"status": 500, "times": 99}, "tried 5 times: the server says 500", 5),
        ({"status": 403, "times": 99}, "the server says 403", 1),
        ({"to": "file:///etc/passwd"}, "the server says 302", 1),
        ({"to": "ftp://127.0.0.1/a.tar"}, "unknown url type", 5),
    ],
)
def test_what_cannot_be_downloaded_is_said(server, tar, tmp_path, odd, says, asked):
    server.odd["a.tar"] = odd
    size = tar.stat().st_size
    with pytest.raises(UserError) as error:
        fetched(server, tmp_path, "a.tar?signature=secret")
    assert says.format(size=size, longer=size + 10) in str(error.value)
    assert f"{server.url}/a.tar " in str(error.value) and "secret" not in str(error.value)
    assert server.asked["a.tar"] in (asked, asked + 1)  # the first try always makes progress
    assert not list((tmp_path / "cache").glob("*/*.tar"))


@pytest.mark.parametrize("to", ["http://me:secret@127.0.0.1/a.tar", "http://127.0.0.1:secret/a.tar"])
def test_a_redirect_to_no_address_is_not_quoted(server, tar, tmp_path, to):
    server.odd["a.tar"] = {"to": to}
    with pytest.raises(UserError, match="leads to what is no address") as error:
        fetched(server, tmp_path)
    assert "secret" not in str(error.value)


def test_nobody_there_and_nowhere_to_write(server, tmp_path):
    with pytest.raises(UserError, match=r"none\.tar cannot be downloaded: the server says 404"):
        fetched(server, tmp_path, "none.tar")
    with pytest.raises(UserError, match=r"tried 5 times: .*refused"):
        Remote(url="http://127.0.0.1:1/a.tar", cache=str(tmp_path)).fetch()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache is another folder"):
        Remote(url=f"{server.url}/a.tar", cache=str(tmp_path / "file")).fetch()


def test_of_several_processes_one_downloads(server, tar, tmp_path):
    server.odd["a.tar"] = {"cut": 5000}
    made = Remote(url=f"{server.url}/a.tar", cache=str(tmp_path / "cache"))
    several = [multiprocessing.get_context("fork").Process(target=made.fetch) for _ in range(4)]
    for process in several:
        process.start()
    for process in several:
        process.join(60)
    assert [process.exitcode for process in several] == [0] * 4
    assert server.asked["a.tar"] == 2  # the cut try and the rest
    assert Path(made.path).read_bytes() == tar.read_bytes()


def serve_numbered(server, *counts: int) -> str:
    """Shards of so many samples each; their pattern."""
    for tar in folder(server.root / "d", *counts).iterdir():
        tar.rename(server.root / tar.name)
    return f"{server.url}/{{000..{len(counts) - 1:03d}}}.tar"


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_of_remote_shards_is_that_of_local_ones(server, tmp_path, workers):
    pattern, local = serve_numbered(server, 7, 5, 9), folder(tmp_path / "local", 7, 5, 9)
    options = {"cache": str(tmp_path / "cache"), "workers": workers}
    found = samples(stream(pattern, **options), 14)
    assert found == samples(stream(local, workers=0), 14)
    for i in range(3):  # once in its life, although nothing was published beside it
        assert server.asked[f"{i:03d}.tar"] == 1
    server.asked.clear()
    made = stream(f"{pattern}?other=signature", **options)
    assert made.bookmark["data"] == stream(local).bookmark["data"]  # moving shards to a server keeps bookmarks
    assert samples(made, 14) == found
    assert not server.asked


def test_a_server_that_dies_within_a_tar_and_comes_back(server, tmp_path):
    """In mid-epoch, after a resume on a machine that has no tar yet."""
    pattern, local = serve_numbered(server, 7, 5, 9), folder(tmp_path / "local", 7, 5, 9)
    with Line(server.server_port) as line:
        threading.Thread(target=line.serve_forever, daemon=True).start()
        pattern = pattern.replace(server.url, line.url)
        made = stream(pattern, cache=str(tmp_path / "cache"))
        last = batches(made, 3)[-1]
        bookmark = json.loads(json.dumps(merge_bookmarks([last.bookmark])))
        server.asked.clear()
        line.ranges.clear()
        line.cut_after(5000, outage=3)
        resumed = stream(pattern, cache=str(tmp_path / "other"), bookmark=bookmark)
        assert samples(resumed, 11) == samples(stream(local), 14)[9:]
        assert len(line.ranges) == 1 and line.outage == 0
        assert sum(server.asked[f"{i:03d}.tar"] for i in range(3)) == 4
        line.shutdown()


@pytest.mark.parametrize("published", ["indexes", "manifest", "statistics"])
def test_published_counts_spare_the_download_at_the_start(server, tmp_path, published):
    pattern = serve_numbered(server, 7, 5, 9)
    for i, count in enumerate((7, 5, 9)):
        if published == "statistics":
            (server.root / f"{i:03d}_stats.json").write_text(json.dumps({"count": 11, "successes": count}))
        else:
            shards.index(str(server.root / f"{i:03d}.tar"))
    if published == "manifest":
        manifest.survey(listing.expand(str(server.root)))
        for index in server.root.glob("*.tar.index.json"):
            index.unlink()
    made = stream(pattern, cache=str(tmp_path / "cache"), batch_size=1)
    assert not any(name.endswith(".tar") for name in server.asked)
    asked = sum(server.asked.values())
    assert asked <= {"indexes": 4, "manifest": 1, "statistics": 7}[published]
    stream(pattern, cache=str(tmp_path / "cache"))
    assert sum(server.asked.values()) == asked
    assert samples(made, 3) == samples(stream(server.root, batch_size=1), 3)
    assert sum(server.asked[f"{i:03d}.tar"] for i in range(3)) in (1, 2)  # 3 samples lie in one or two tars


@pytest.mark.parametrize("workers", [0, 1])
def test_published_counts_that_are_wrong_stop_the_run(server, tmp_path, workers):
    pattern = serve_numbered(server, 7, 5)
    for i, count in enumerate((7, 6)):
        (server.root / f"{i:03d}_stats.json").write_text(json.dumps({"successes": count}))
    with pytest.raises(UserError, match=r"001\.tar should hold 6 samples.*it holds 5 samples"):
        samples(stream(pattern, cache=str(tmp_path / "cache"), workers=workers, batch_size=1), 13)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"blocks": 3}', '{"successes": 1e999}', '{"successes": -1}', "[" * 9**6]
)
def test_published_nonsense_is_not_believed(server, tmp_path, text):
    pattern = serve_numbered(server, 4)
    for name in ("000.tar.index.json", "000_stats.json", manifest.NAME):
        (server.root / name).write_text(text)
    assert len(samples(stream(pattern, cache=str(tmp_path / "cache"), batch_size=1), 4)) == 4


def test_room_is_made_while_shards_are_read(server, tmp_path):
    """There is room for two of six tars: nothing is lost by removing the others again and again."""
    pattern = serve_numbered(server, *[5] * 6)
    size = (server.root / "000.tar").stat().st_size
    options = {"cache": str(tmp_path / "cache"), "cache_gb": 2.5 * size / 1e9, "workers": 2, "shuffle": 30}
    found = samples(stream(pattern, **options), 20)
    assert sorted(found[:30]) == sorted(found[30:]) == [f"{i:05d}" for i in range(30)]
    assert len(list((tmp_path / "cache").glob("*/*.tar"))) == 2
    before = sum(server.asked.values())
    stream(pattern, **options)  # what was removed is still known
    assert sum(server.asked.values()) == before


def test_a_bad_sample_is_named_by_its_address(server, tmp_path):
    write(server.root / "a.tar", [{"__key__": "x", "npy": b"no array", "txt": "1"}])
    (server.root / "b.tar").write_text("no tar")
    log = tmp_path / "quarantine.jsonl"
    urls = [f"{server.url}/{name}.tar?secret" for name in "ab"]
    with pytest.raises(UserError, match="not one of"):
        samples(stream({"d": DatasetConfig(shards=urls)}, cache=str(tmp_path / "cache"), path=log), 1)
    named = {json.loads(line)["shard"] for line in log.read_text().splitlines()}
    assert named == {f"{server.url}/a.tar", f"{server.url}/b.tar"}
    write(server.root / "b.tar", pairs(3))  # what was no tar is not kept: here it was mended
    assert len(manifest.survey(urls, cache=str(tmp_path / "cache"))[urls[1]]) == 3


def test_default_folder(server, tar, tmp_path, monkeypatch):
    monkeypatch.setenv("ANYMAL_CACHE", str(tmp_path / "all"))
    (found,) = manifest.survey([f"{server.url}/a.tar"]).values()
    assert Path(found.path).is_relative_to(tmp_path / "all" / "shards")
    assert os.path.basename(found.path) == "a.tar" and len(found) == 20


def test_a_proxy_that_was_set_since_the_last_request_is_used(server, tmp_path, monkeypatch):
    for name in ("no_proxy", "NO_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    far = Remote(url="http://127.0.0.1:1/a.tar", cache=str(tmp_path))
    (server.root / "http:" / "127.0.0.1:1").mkdir(parents=True)  # a proxy is asked for the whole address
    (server.root / "http:" / "127.0.0.1:1" / "stats.json").write_text('{"n": 1}')
    assert far.published("stats.json") is None
    monkeypatch.setenv("http_proxy", server.url)
    assert far.published("stats.json") == {"n": 1}
