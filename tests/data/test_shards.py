"""Shards: which there are, where their samples lie, and what is done about tars that are cut, empty or hostile."""

import gzip
import io
import json
import os
import random
import tarfile
import tempfile
from pathlib import Path

import pytest
import webdataset

from anymal.data import feature_cache, index_files, listing, shards
from anymal.errors import BadSample, UserError


def write(path: Path, samples: list[dict]) -> Path:
    with webdataset.TarWriter(str(path)) as tar:
        for sample in samples:
            tar.write(sample)
    return path


def pairs(n: int, size: int = 700) -> list[dict]:
    """Samples whose bytes are told apart."""
    return [{"__key__": f"s{i:04d}", "bin": bytes([i % 256]) * (size + i), "txt": f"caption {i}"} for i in range(n)]


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    tar.addfile(info, io.BytesIO(data))


def read_all(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    index = shards.index(str(path))
    return [shards.read(str(path), *index.place(i)) for i in range(len(index))]


def as_webdataset_reads(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    raw = webdataset.WebDataset(str(path), shardshuffle=False)
    return [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in raw]


def test_expand(tmp_path):
    for name in ("b.tar", "a.tar", "c.txt"):
        (tmp_path / name).touch()
    a, b = str(tmp_path / "a.tar"), str(tmp_path / "b.tar")
    assert listing.expand(str(tmp_path)) == [a, b]
    assert listing.expand(a) == [a]
    assert listing.expand(tmp_path / "a.tar") == [a]
    assert listing.expand(f"{tmp_path}/{{b,a}}.tar") == [b, a]
    assert listing.expand([b, f"{tmp_path}/{{a..a}}.tar"]) == [b, a]
    urls = ["http://host/d/0.tar?k=1", "http://host/d/1.tar?k=1"]
    assert listing.expand("http://host/d/{0..1}.tar?k=1") == urls


@pytest.mark.parametrize(
    "name, says",
    [
        ("pipe:touch {tmp}/ran", "never run"),
        ("{tmp}/a.tar::pipe:touch {tmp}/ran", "never run"),
        ("ftp://host/a.tar", "only files, http://, https://, s3://, gs://, hf://"),
        ("https://host/a.tar::pipe:touch {tmp}/ran", "no spaces"),
        ("https://host/a.tar::pipe:ls", "must end in .tar"),
        ("https://host/a.tar.gz", "decompress it where it lies"),
        ("https://[::1/a.tar", "is not an address"),
        ("https://host/{{a.tar,b}}", "must end in .tar"),
        ("https://me:secret@host/a.tar", "without user or password"),
        (["https://host/a.tar", "https://host/{{a,b}}.tar"], "listed twice"),
        ("{tmp}/none.tar", "there is no shard {tmp}/none.tar"),
        ("{tmp}/{{a,none}}.tar", "there is no shard {tmp}/none.tar"),
        ("{tmp}/packed.tar.gz", "decompress it first"),
        ("{tmp}/packed", "decompress what is in there"),
        (["{tmp}/a.tar", "{tmp}"], "listed twice"),
        ([], "names no shard"),
        (None, "names no shard"),
    ],
)
def test_expand_refuses(tmp_path, name, says):
    (tmp_path / "packed").mkdir()
    for file in ("a.tar", "packed.tar.gz", "packed/x.tar.gz"):
        (tmp_path / file).touch()
    asked = [item.format(tmp=tmp_path) for item in name] if isinstance(name, list) else name
    with pytest.raises(UserError) as error:
        listing.expand(asked.format(tmp=tmp_path) if isinstance(asked, str) else asked)
    assert says.format(tmp=tmp_path) in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_samples_are_those_that_webdataset_reads(tmp_path):
    path = write(tmp_path / "a.tar", pairs(50))
    assert read_all(path) == as_webdataset_reads(path)
    assert len(read_all(path)) == 50


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_odd_members(tmp_path, form):
    """Folders, long names, members without a suffix, metadata, links, capitals: as webdataset has them."""
    path = tmp_path / "a.tar"
    long = "d/" * 60 + "n" * 120
    with tarfile.open(path, "w", format=form) as tar:
        add(tar, "README", b"no suffix")
        add(tar, "__meta__", b"{}")
        add(tar, "__meta__/a.txt", b"{}")
        add(tar, "d", kind=tarfile.DIRTYPE)
        add(tar, "d/a.0.JPG", b"1")
        add(tar, "d/README", b"between")
        add(tar, "d/a.txt", b"2")
        add(tar, f"{long}.txt", b"3")
        add(tar, f"{long}.jpg", b"4" * 2000)
        add(tar, "link.txt", kind=tarfile.SYMTYPE)
        add(tar, "naïve.txt", "é".encode())
        add(tar, "d/a.txt", b"the same key later is another sample")
    found = read_all(path)
    assert found == as_webdataset_reads(path)
    assert [key for key, _ in found] == ["d/a", long, "naïve", "d/a"]
    assert set(found[0][1]) == {"0.jpg", "txt"}


def test_index_file_is_used_until_the_tar_changes(tmp_path):
    path = write(tmp_path / "a.tar", pairs(4))
    first = shards.index(str(path))
    beside = Path(f"{path}.index.json")
    known = json.loads(beside.read_text())
    assert known["blocks"] == first.blocks.tolist()
    blocks = known["blocks"]
    beside.write_text(json.dumps(known | {"bad": {"0": "seen"}}))  # shows that the file is read
    assert shards.index(str(path)).bad == {0: "seen"}
    for damaged in (
        {"blocks": [-1]},
        {"stamp": [0]},
        {"problem": "is no tar, they say"},
        {"blocks": blocks[::-1]},
        {"blocks": [blocks]},
        {"blocks": [*blocks[:-1], blocks[-1] + 100]},  # beyond the tar's end
        {"blocks": [block + 1 for block in blocks]},  # where no header is
        {"blocks": [0]},
        {"bad": {"4": "there is none"}},
        {"bad": {"0": ""}},  # no reason that could be told
        "",
        "[1]",
        "{",
        "[" * 10**6,
        json.dumps(known) + " " * (index_files.LARGEST_JSON + 10**4),
    ):
        beside.write_text(damaged if isinstance(damaged, str) else json.dumps(known | damaged))
        found = shards.index(str(path))
        assert found.blocks.tolist() == first.blocks.tolist() and not found.bad and not found.problem
        assert json.loads(beside.read_text()) == known, "it was made again"

    shards.read(str(path), *first.place(0))  # opens the old file
    write(path, pairs(9, size=100))
    assert len(shards.index(str(path))) == 9
    assert read_all(path) == as_webdataset_reads(path)

    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # same size, another time: walked again
    assert len(shards.index(str(path))) == 9
    assert json.loads(beside.read_text())["stamp"][2] == stat.st_mtime_ns + 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "a.tar.index.json"]


def test_read_only_folder_uses_the_cache(monkeypatch):
    """As another user when the tests run as root, for whom no folder is read-only."""
    with tempfile.TemporaryDirectory() as folder:
        data, cache = Path(folder, "data"), Path(folder, "cache")
        for made in (data, cache):
            made.mkdir()
        path = write(data / "a.tar", pairs(3))
        os.chmod(folder, 0o755)
        os.chmod(cache, 0o777)
        os.chmod(data, 0o555)
        monkeypatch.setenv("ANYMAL_CACHE", str(cache))
        was_root = os.geteuid() == 0
        try:
            if was_root:
                os.seteuid(65534)
            assert len(shards.index(str(path))) == 3
            (cached,) = (cache / "index").iterdir()
            cached.write_text(cached.read_text().replace('"bad":{}', '"bad":{"0":"seen"}'))
            assert shards.index(str(path)).bad == {0: "seen"}
        finally:
            if was_root:
                os.seteuid(0)
            os.chmod(data, 0o755)
        assert [p.name for p in data.iterdir()] == ["a.tar"]


def test_pipes_and_devices_in_the_place_of_files_are_not_opened(tmp_path, no_waiting, monkeypatch):
    monkeypatch.setenv("ANYMAL_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path / "a.tar", pairs(3))
    beside = Path(f"{path}.index.json")
    for make in (os.mkfifo, lambda place: os.symlink("/dev/null", place)):
        make(beside)
        assert len(shards.index(str(path))) == 3
        beside.unlink()
        tar = tmp_path / "b.tar"
        make(tar)
        with pytest.raises(UserError, match=r"b\.tar is not a regular file"):
            listing.expand(str(tar))
        assert listing.expand(str(tmp_path)) == [str(path), str(tar)]
        with pytest.raises(UserError, match=r"b\.tar is not a regular file"):
            shards.index(str(tar))
        assert feature_cache.read_header(str(tar)) is None
        tar.unlink()


def test_nowhere_to_write_is_no_error(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tar", pairs(3))
    Path(f"{path}.index.json").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("ANYMAL_CACHE", str(tmp_path / "file"))
    assert len(shards.index(str(path))) == 3
    assert not list(tmp_path.glob(".index-*"))


def test_a_tar_cut_anywhere_gives_whole_samples_or_named_bad_ones(tmp_path):
    whole = write(tmp_path / "whole.tar", pairs(4))
    data, samples = whole.read_bytes(), dict(read_all(whole))
    end = max(shards.index(str(whole)).blocks) * 512
    for cut in [*range(256, end + 512, 256), 1, 511]:
        path = tmp_path / "cut.tar"
        path.write_bytes(data[:cut])
        index = shards.index(str(path))
        path.with_name("cut.tar.index.json").unlink()
        if cut < end + 512:
            assert index.bad.keys() == {len(index) - 1} if len(index) else index.problem, cut
        else:
            assert not index.bad
        for i in range(len(index)):
            key = f"s{i:04d}"
            assert shards.name_of(str(path), *index.place(i)) == key
            if i not in index.bad:
                assert shards.read(str(path), *index.place(i)) == (key, samples[key])
    path.write_bytes(data[: end - 510])
    index = shards.index(str(path))
    with pytest.raises(BadSample, match="does not read"):
        shards.read(str(path), *index.place(len(index) - 1))


@pytest.mark.parametrize(
    "data, says",
    [
        (b"", "is not a tar"),
        (b"some text\n" * 200, "is not a tar"),
        (b"x", "is not a tar"),
        (gzip.compress(b"x" * 5000), "is compressed"),
        (bytes(10240), "holds no sample"),
    ],
    ids=["empty", "text", "byte", "gzip", "zeros"],  # the bytes of a gzip hold the time
)
def test_files_that_are_no_tars(tmp_path, data, says):
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    index = shards.index(str(path))
    assert len(index) == 0
    assert says in index.problem
    assert shards.index(str(path)).problem == index.problem  # also from the index file


def test_a_tar_that_cannot_be_opened_is_the_users_to_mend(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        shards.index(str(tmp_path / "none.tar"))


def test_sparse_and_compressed_members_are_not_expanded(tmp_path):
    """A few bytes of header could else make a worker allocate terabytes."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("sparse.bin")
        info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,1"}
        info.pax_headers |= {"GNU.sparse.size": str(1 << 50), "GNU.sparse.name": "sparse.bin"}
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
        add(tar, "BZh91AY&SY.txt", b"x")
    index = shards.index(str(path))
    assert len(index) == 2
    assert "sparse" in index.bad[0]
    with pytest.raises(BadSample, match="named like compressed data"):
        shards.read(str(path), *index.place(1))


def test_suffix_twice_and_too_large(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "a.txt", b"1")
        add(tar, "a.TXT", b"2")
    with pytest.raises(BadSample, match="duplicate"):
        shards.read(str(path), *shards.index(str(path)).place(0))
    with pytest.raises(BadSample, match="largest"):
        shards.read(str(path), 0, shards.LARGEST_SAMPLE + 1)


def test_damaged_bytes_raise_nothing_but_bad_samples(tmp_path):
    data = write(tmp_path / "whole.tar", pairs(6, size=100)).read_bytes()
    path = tmp_path / "damaged.tar"
    rng = random.Random(0)
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 4, 40])):
            damaged[rng.randrange(len(data))] = rng.choice([0, 0x80, 0xFF, ord("9"), rng.randrange(256)])
        path.write_bytes(damaged)
        index = shards.index(str(path))
        path.with_name("damaged.tar.index.json").unlink()
        for i in range(len(index)):
            shards.name_of(str(path), *index.place(i))
            assert_fast_reading_is_right(path, *index.place(i))
            try:
                shards.read(str(path), *index.place(i))
            except BadSample:
                continue


def assert_fast_reading_is_right(path: Path, offset: int, size: int) -> bool:
    """Whatever the fast way returns, webdataset returns as well; whether it returned anything."""
    found = shards._plain(data := shards._bytes(str(path), offset, size))
    assert found is None or found == shards._any(str(path), data)
    return found is not None


def test_fast_reading_agrees_with_webdataset(tmp_path):
    """Damage in the headers, byte after byte, after the tar was indexed; and samples of every odd kind."""
    path = write(tmp_path / "a.tar", pairs(1, size=10))
    index, data = shards.index(str(path)), path.read_bytes()
    assert assert_fast_reading_is_right(path, *index.place(0))
    needless = {*range(100, 124), *range(136, 148), *range(329, 345)}  # mode, owner, time, device: tarfile reads them
    found = []
    for at in {*range(512), *range(1024, 1536)} - needless - {i + 1024 for i in needless}:
        for value in (0, ord(" "), ord("/"), ord("."), ord("7"), 0x80):
            for mend in (False, True):  # the checksum, so that the damage is not noticed by it
                header = bytearray(data[at // 512 * 512 :][:512])
                header[at % 512] = value
                if mend:
                    header[148:156] = b" " * 8
                    header[148:156] = b"%06o\0 " % sum(header)
                damaged = data[: at // 512 * 512] + header + data[at // 512 * 512 + 512 :]
                path.write_bytes(damaged)
                found.append(assert_fast_reading_is_right(path, *index.place(0)))
    assert 0.2 < sum(found) / len(found) < 0.8  # neither way is all that was tested


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize(
    "names, fast",
    [
        (("a.txt", "a.jpg"), True),
        (("a.TXT", "README", "a.b.jpg"), True),
        (("__meta__/a.txt", "a.txt"), True),
        (("d/.a.txt", "d/.b"), True),
        (("d.x/.a.txt",), False),
        (("naïve.txt",), None),  # in a pax header, in one of the formats
        (("x/" * 60 + "a.txt",), False),
        (("a.txt", "a.TXT"), False),
        (("a.txt", "b.txt"), False),
        (("a.__url__",), False),
        (("README",), False),
    ],
)
def test_fast_reading_of_odd_samples(tmp_path, form, names, fast):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for name in names:
            add(tar, name, name.encode() * 99)
    data = path.read_bytes().rstrip(b"\0")
    data += bytes(-len(data) % 512)
    found = shards._plain(data)
    assert fast is None or (found is not None) == fast
    if found is not None:
        assert found == shards._any(str(path), data)


def test_many_files_do_not_stay_open(tmp_path):
    paths = [write(tmp_path / f"{i:02d}.tar", pairs(1)) for i in range(40)]
    before = len(os.listdir("/proc/self/fd"))
    for path in paths * 2:
        assert len(read_all(path)) == 1
    assert len(os.listdir("/proc/self/fd")) <= before + 32
