"""Shards in object stores, from real servers that are cut off and come back, to the stream that reads them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_shards import pairs, write

from anymal.data import listing, object_store, remote, shards
from anymal.data.remote import Remote
from anymal.data.stream import merge_bookmarks
from anymal.errors import UserError
from stores import KEY, SECRET, TOKEN, serving
from streams import folder, samples, stream


@pytest.fixture(params=["s3", "gs", "hf"])
def store(request, monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF", 0.001)
    monkeypatch.setattr(object_store, "BLOCK", 4096)
    with serving(request.param, monkeypatch) as made:
        yield made


@pytest.fixture
def tar(store, tmp_path) -> bytes:
    """A tar in the store, of 20 samples and a dozen blocks."""
    data = write(tmp_path / "a.tar", pairs(20)).read_bytes()
    store.put("a.tar", data)
    assert len(data) > 10 * 4096
    return data


def fetched(store, tmp_path, name="a.tar") -> Remote:
    made = Remote(url=f"{store.url}/{name}", cache=str(tmp_path / "cache"))
    made.fetch()
    return made


def put_numbered(store, tmp_path, *counts: int) -> tuple[str, Path]:
    """Shards of so many samples each, in the store and beside it; their pattern and that folder."""
    local = folder(tmp_path / "local", *counts)
    for tar in local.iterdir():
        store.put(tar.name, tar.read_bytes())
    return f"{store.url}/{{000..{len(counts) - 1:03d}}}.tar", local


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_is_that_of_local_shards_and_goes_on_in_mid_epoch(store, tmp_path, workers):
    pattern, local = put_numbered(store, tmp_path, 7, 5, 9)
    whole = samples(stream(local), 14)
    made = stream(pattern, cache=str(tmp_path / "cache"), workers=workers)
    (first, *_, last) = [batch for _, batch in zip(range(3), made, strict=False)]
    assert first.keys == whole[:3]
    bookmark = json.loads(json.dumps(merge_bookmarks([last.bookmark])))
    assert bookmark["data"] == stream(local).bookmark["data"]  # moving shards to a store keeps bookmarks
    asked = len(store.line.ranges)
    resumed = stream(pattern, cache=str(tmp_path / "cache"), workers=workers, bookmark=bookmark)
    assert samples(resumed, 11) == whole[9:]
    assert len(store.line.ranges) == asked  # each tar was downloaded once
    elsewhere = stream(pattern, cache=str(tmp_path / "other"), workers=workers, bookmark=bookmark)
    assert samples(elsewhere, 11) == whole[9:]


def test_published_counts_spare_the_download_at_the_start(store, tmp_path):
    pattern, local = put_numbered(store, tmp_path, 7, 5)
    stream(local)
    store.put("anymal.index.json", (local / "anymal.index.json").read_bytes())
    made = stream(pattern, cache=str(tmp_path / "cache"), batch_size=1)
    assert not list((tmp_path / "cache").glob("*/*.tar"))
    assert samples(made, 2) == samples(stream(local, batch_size=1), 2)
    assert len(list((tmp_path / "cache").glob("*/*.tar"))) in (1, 2)


def test_a_server_that_dies_within_a_tar_and_comes_back(store, tar, tmp_path):
    # long enough for s3fs to give up, as it is set here; the others' own patience would take half a minute
    store.line.cut_after(30_000, outage=4 if store.url.startswith("s3") else 1)
    assert Path(fetched(store, tmp_path).path).read_bytes() == tar
    assert store.line.ranges.count(0) == 1  # it went on where it was


def test_an_object_that_changes_between_two_tries_is_not_mixed(store, tar, tmp_path):
    other = tar[::-1]
    store.line.cut_after(30_000, then=lambda: store.put("a.tar", other))
    assert Path(fetched(store, tmp_path).path).read_bytes() == other


def test_an_object_that_changes_while_it_is_read_is_not_mixed(store, tar, tmp_path, monkeypatch):
    other, read, changed = tar[::-1], object_store.blocks, []

    def changing(url, start):
        for number, block in enumerate(read(url, start)):
            yield block
            if number == 2 and not start and not changed:
                changed.append(store.put("a.tar", other))

    monkeypatch.setattr(object_store, "blocks", changing)
    assert Path(fetched(store, tmp_path).path).read_bytes() == other


def test_an_index_fits_a_tar_that_was_removed_and_comes_back(store, tar, tmp_path):
    path = fetched(store, tmp_path).path
    assert len(shards.index(path)) == 20
    before = os.stat(path).st_mtime_ns
    os.unlink(path)
    assert os.stat(fetched(store, tmp_path).path).st_mtime_ns == before


def test_what_is_not_there_is_said_at_once(store, tar, tmp_path):
    store.put("folder.tar/x", b"x")
    for name in ("none.tar", "folder.tar"):
        with pytest.raises(UserError, match=rf"{store.url}/{name} cannot be downloaded: it is (not there|a folder)"):
            fetched(store, tmp_path, name)
    assert not list((tmp_path / "cache").glob("*/*.tar"))


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_no_credentials_are_in_what_is_said_of_a_server_that_stays_away(store, tmp_path, monkeypatch, capfd):
    host = store.line.url.removeprefix("http://")
    pattern, _ = put_numbered(store, tmp_path, 7, 5)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{KEY}:{SECRET}@{host}")
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    store.line.outage = 10**6
    said = []
    for workers in (0, 1):
        log = tmp_path / f"quarantine-{workers}.jsonl"
        with pytest.raises(UserError, match=r"000\.tar cannot be downloaded, tried 5 times: ") as error:
            samples(stream(pattern, cache=str(tmp_path / "cache"), workers=workers, path=log), 1)
        said.append(str(error.value))
    said += [str(item) for item in capfd.readouterr()]
    said += [path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    for secret in (KEY, SECRET, TOKEN):
        assert not any(secret in text for text in said)


@pytest.mark.parametrize("store", ["s3", "hf"], indirect=True)
def test_who_is_not_let_in_is_told_how(store, tar, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    with pytest.raises(UserError, match=r"AWS_PROFILE or AWS_ACCESS_KEY_ID|make sure you are authenticated"):
        fetched(store, tmp_path)


@pytest.mark.parametrize("scheme, package, extra", [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs")])
def test_a_missing_extra_is_named_before_anything_is_loaded(scheme, package, extra):
    program = f"""
import sys
sys.modules["{package}"] = None  # as where it is not installed
from anymal.data import listing
listing.expand("{scheme}://bucket/{{000..001}}.tar")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert f"UserError: {scheme}:// cannot be read" in done.stderr
    assert f"pip install 'anymal[{extra}]'" in done.stderr


@pytest.mark.parametrize(
    "url, says",
    [
        ("s3://bucket/a.tar?versionId=1", "without ? and #"),
        ("s3://bucket/a.tar.gz", "decompress it where it lies"),
        ("gs:///a.tar", "wanted is gs://BUCKET/PATH.tar"),
        ("s3://bucket/a\n.tar", "no spaces"),
        ("zip://a.tar::s3://bucket/b.zip", "zip:// is not read"),
    ],
)
def test_what_is_no_address_of_an_object_is_refused(url, says):
    with pytest.raises(UserError) as error:
        listing.expand(url)
    assert says in str(error.value)


@pytest.mark.parametrize("secret", ["secret-0123", "sec/ret-0123", "sec?ret-0123"])
@pytest.mark.parametrize(
    "name",
    [
        "s3://me:{}@bucket/a.tar",
        "https://me:{}@host/a.tar",
        "ftp://me:{}@host/a.tar",
        "https://me:{}@höst/a.tar",
        "https://me:{}@host/{{a,b.tar",
        "https://me:{}@host/a.tgz",
        "https://host/{{a,b.tar?signature={}",
        "pipe:curl -H 'Authorization: {}' https://host/a.tar",
    ],
)
def test_no_password_is_in_what_is_said_of_an_address(name, secret):
    with pytest.raises(UserError) as error:
        listing.expand(name.format(secret))
    assert "ret-0123" not in str(error.value)
