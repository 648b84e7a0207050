"""Tars at addresses: each is downloaded whole, once, into a folder that a machine's processes share.

Called by `manifest` only: everything else sees a local tar. No index is needed on the other side. http and https are
spoken here, and nothing else where a server redirects to something else; `object_store` reads s3, gs and hf.
"""

import errno
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

from anymal.config.settings import public_message, public_text
from anymal.data import object_store
from anymal.errors import UserError

TRIES, BACKOFF, TIMEOUT = 5, 1.0, 60.0  # tries without progress; seconds before the second, doubling; for one answer
_LARGEST_JSON = 1 << 25  # bytes; a larger one takes more memory than the counts in it are worth
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)


def is_url(name: str) -> bool:
    """Whether a shard's name is an address."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name) is not None


def check(url: str) -> None:
    """Refuse what is no address of a tar, or cannot be read here, without asking anybody.

    Raises:
        UserError: Another scheme, or one whose library is not installed; not a .tar, no host, or a password in it.
    """
    store = object_store.scheme_of(url)
    if re.search(r"[\x00-\x1f\x7f]", url) or (not store and not re.fullmatch(r"[!-~]*", url)):
        raise UserError(
            f"{public_text(url)!r}: an address has no spaces and only ASCII characters; write the others as %XX"
        )
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise UserError(f"{public_text(url)} is not an address: {error}") from error
    scheme, name = parts.scheme.lower(), public_text(url)
    if not store and scheme not in ("http", "https"):
        known = ", ".join(f"{known}://" for known in ("http", "https", *object_store.INSTALL))
        raise UserError(f"{name}: {scheme}:// is not read, only files, {known}")
    if not _is_host(parts, store):
        wanted = "BUCKET" if store else "HOST"
        raise UserError(f"{scheme}://…: wanted is {scheme}://{wanted}/PATH.tar, without user or password")
    if store and re.search("[?#]", url):
        raise UserError(f"{name}: an object is named without ? and #; its endpoint and credentials are not settings")
    if not parts.path.endswith(".tar"):
        packed = re.search(r"\.(tar\.\w+|tgz|tbz2?|txz)$", parts.path)
        hint = "it is compressed; decompress it where it lies" if packed else "its path must end in .tar"
        raise UserError(f"{name} is not the address of a tar: {hint}")
    if store:
        object_store.require(store)


def _is_host(parts: urllib.parse.SplitResult, store: str) -> bool:
    """Whether an address has a host and nothing before it, or a bucket: a key with a / in it looks like a port."""
    try:
        port = parts.port
    except ValueError:
        return False
    return bool(parts.hostname) and "@" not in parts.netloc and not (store and port is not None)


def _without_query(url: str) -> str:
    """An address as it may be shown and kept: what follows the ? may be a signature, and changes."""
    return urllib.parse.urlsplit(url)._replace(query="", fragment="").geturl()


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A tar elsewhere, and where it lies once it is here."""

    url: str = field(repr=False)
    """Its address; what follows the ? may be a signature."""
    cache: str
    """Folder of everything that was downloaded."""
    limit: int = 0
    """Largest size of that folder in bytes; 0 is no limit."""

    @property
    def name(self) -> str:
        """The address without what may be a signature."""
        return _without_query(self.url)

    @property
    def path(self) -> str:
        """The local tar: in one folder for all tars of a remote folder."""
        folder, name = self.name.rsplit("/", 1)
        digest = hashlib.sha256(folder.encode()).hexdigest()[:16]
        host = re.sub(r"[^A-Za-z0-9.-]", "_", urllib.parse.urlsplit(folder).netloc)
        return os.path.join(self.cache, f"{host}-{digest}", name)

    def fetch(self) -> None:
        """Have the tar at `path`; of several processes one downloads and the others wait.

        Raises:
            UserError: It is not there, it cannot be downloaded after several tries, or the disk is full.
        """
        try:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            with FileLock(f"{self.path}.lock"):
                if _touch(self.path):
                    return
                part = f"{self.path}.part"
                modified = _download(self, part)
                if modified:  # so that an index made of this tar fits it again after it was removed and comes back
                    os.utime(part, (time.time(), modified))
                os.replace(part, self.path)
        except OSError as error:
            raise UserError(
                f"{self.name} cannot be kept in {self.cache} ({error.strerror or error}); data.cache is another "
                "folder, and data.cache_gb a limit to it"
            ) from error
        if self.limit:
            _make_room(self)

    def published(self, what: str) -> Any:
        """The JSON at an address beside the tar; None if there is none, or no JSON."""
        try:
            url = f"{self.name.rsplit('/', 1)[0]}/{what}"
            if object_store.scheme_of(url):
                return json.loads(object_store.read(url, _LARGEST_JSON))
            with _ask(url) as answer:
                return json.loads(answer.read(_LARGEST_JSON))
        except (OSError, http.client.HTTPException, object_store.Refused, ValueError, RecursionError):
            return None


def _touch(path: str) -> bool:
    """Whether the file is there; if so, it counts as used now. Its mtime stays: the index depends on it."""
    try:
        os.utime(path, ns=(time.time_ns(), os.stat(path).st_mtime_ns))
    except FileNotFoundError:
        return False
    return True


def _make_room(keep: Remote) -> None:
    """Remove the tars that were not used for longest. Who has one open reads on; who needs it again downloads it."""
    tars = [(stat.st_atime_ns, stat.st_size, path) for path, stat in _tars(keep.cache)]
    excess = sum(size for _, size, _ in tars) - keep.limit
    for _, size, path in sorted(tars):
        if excess <= 0:
            return
        if path != keep.path:
            with suppress(FileNotFoundError):
                os.unlink(path)
            excess -= size


def _tars(cache: str) -> Iterator[tuple[str, os.stat_result]]:
    for tar in Path(cache).glob("*/*.tar"):
        with suppress(FileNotFoundError):
            yield str(tar), tar.stat()


def _opener() -> urllib.request.OpenerDirector:
    """Speaks http and https alone, through the proxies that the environment names by now."""
    opener = urllib.request.OpenerDirector()
    for handler in ("Proxy", "HTTP", "HTTPS", "HTTPRedirect", "HTTPDefaultError", "Unknown"):
        opener.add_handler(getattr(urllib.request, f"{handler}Handler")())
    opener.add_handler(urllib.request.HTTPErrorProcessor())
    return opener


def _ask(url: str, headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
    request = urllib.request.Request(url, headers={"User-Agent": "anymal", **(headers or {})})
    return _opener().open(request, timeout=TIMEOUT)


@dataclass(kw_only=True)
class _Progress:
    """How far a download is."""

    got: int = 0
    total: int | None = None
    validator: str = ""
    modified: float | None = None


def _download(remote: Remote, part: str) -> float | None:
    """Write the tar to `part`, going on after a cut where the server allows; its time of change, if known."""
    progress, furthest, tries = _Progress(), 0, 0
    receive = _receive_object if object_store.scheme_of(remote.url) else _receive
    with open(part, "wb") as file:
        while True:
            try:
                receive(remote.url, file, progress)
                if progress.total in (None, progress.got):
                    break
                problem = f"{progress.got:,} of {progress.total:,} bytes came"
            except urllib.error.HTTPError as error:
                problem = f"the server says {error.code} {error.reason}"
                if error.code == 416:
                    progress.validator = ""  # nothing to go on with: from the beginning
                elif error.code not in object_store.TRANSIENT:
                    raise UserError(f"{remote.name} cannot be downloaded: {problem}") from error
            except object_store.Refused as error:
                raise UserError(f"{remote.name} cannot be downloaded: {error}") from error
            except http.client.InvalidURL as error:  # which it quotes, with all that is secret in it
                raise UserError(f"{remote.name} cannot be downloaded: it leads to what is no address") from error
            except (OSError, http.client.HTTPException, ValueError) as error:
                if isinstance(error, OSError) and error.errno in _LOCAL:
                    raise
                problem = public_message(str(error)) or type(error).__name__
            tries = 1 if progress.got > furthest else tries + 1
            furthest = max(furthest, progress.got)
            if tries >= TRIES:
                raise UserError(f"{remote.name} cannot be downloaded, tried {TRIES} times: {problem}")
            time.sleep(BACKOFF * 2 ** (tries - 1))
        file.flush()
        os.fsync(file.fileno())
    return progress.modified


def _receive(url: str, file: BinaryIO, progress: _Progress) -> None:
    """One answer of the server, appended to what came before if it is certain that it is the rest of the same file."""
    headers = {"Accept-Encoding": "identity"}
    if progress.got and progress.total and progress.validator:
        headers |= {"Range": f"bytes={progress.got}-", "If-Range": progress.validator}
    with _ask(url, headers) as answer:
        sent = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        rest = answer.status == 206 and sent and (int(sent[1]), int(sent[2])) == (progress.got, progress.total)
        if answer.status == 206 and not rest:
            progress.validator = ""
            raise ValueError(f"asked for the bytes from {progress.got:,} on, got {answer.headers.get('Content-Range')}")
        if not rest:
            length, tag = answer.headers.get("Content-Length"), answer.headers.get("ETag", "")
            changed = answer.headers.get("Last-Modified", "")
            progress.validator = tag if tag.startswith('"') else changed  # a weak tag promises no equal bytes
            with suppress(ValueError):
                progress.modified = parsedate_to_datetime(changed).timestamp() if changed else None
            progress.total = None if length is None else int(length)
            _begin_again(file, progress)
        while block := answer.read(1 << 20):
            file.write(block)
            progress.got += len(block)


def _receive_object(url: str, file: BinaryIO, progress: _Progress) -> None:
    """What is missing of an object, or all of it if it is no longer the one that the beginning is of."""
    about = object_store.about(url)
    if about.identity != progress.validator:
        progress.total, progress.validator, progress.modified = about.size, about.identity, about.modified
        _begin_again(file, progress)
    for block in object_store.blocks(url, progress.got):
        file.write(block)
        progress.got += len(block)
    if object_store.about(url) != about:
        progress.validator = ""
        raise ValueError("it was changed while it was downloaded")


def _begin_again(file: BinaryIO, progress: _Progress) -> None:
    progress.got = 0
    file.seek(0)
    file.truncate()
