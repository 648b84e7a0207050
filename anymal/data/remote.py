"""Tars behind http(s) addresses: each is downloaded whole, once, into a folder that a machine's processes share.

Called by `manifest` only: everything else sees a local tar. No index is needed on the other side. Nothing but http and
https is ever spoken, also where a server redirects to something else.
"""

import errno
import fcntl
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from anymal.config.settings import public_text
from anymal.errors import UserError

TRIES, BACKOFF, TIMEOUT = 5, 1.0, 60.0  # tries without progress; seconds before the second, doubling; for one answer
_LARGEST_JSON = 1 << 25  # bytes; a larger one takes more memory than the counts in it are worth
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)


def is_url(name: str) -> bool:
    """Whether a shard's name is an address."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name) is not None


def check(url: str) -> None:
    """Refuse what is no address of a tar, without asking anybody.

    Raises:
        UserError: Another scheme, not a .tar, no host, or a password in it.
    """
    if not url.isascii() or re.search(r"[\x00-\x20\x7f]", url):
        raise UserError(
            f"{public_text(url)!r}: an address has no spaces and only ASCII characters; write the others as %XX"
        )
    try:
        parts, name = urllib.parse.urlsplit(url), _without_query(url)
    except ValueError as error:
        raise UserError(f"{public_text(url)} is not an address: {error}") from error
    if parts.scheme.lower() not in ("http", "https"):
        how = "mount the bucket and give its path, or give pre-signed https addresses"
        raise UserError(f"{name}: {parts.scheme}:// is not read, only files, http:// and https://; {how}")
    if not parts.hostname or "@" in parts.netloc:
        raise UserError(f"{parts.scheme}://…{parts.path}: wanted is https://HOST/PATH.tar, without user or password")
    if not parts.path.endswith(".tar"):
        packed = re.search(r"\.(tar\.\w+|tgz|tbz2?|txz)$", parts.path)
        hint = "it is compressed; decompress it where it lies" if packed else "its path must end in .tar"
        raise UserError(f"{name} is not the address of a tar: {hint}")


def _without_query(url: str) -> str:
    """An address as it may be shown and kept: what follows the ? may be a signature, and changes."""
    return urllib.parse.urlsplit(url)._replace(query="", fragment="").geturl()


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A tar elsewhere, and where it lies once it is here."""

    url: str
    """Its address."""
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
            with _lock(f"{self.path}.lock"):
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
            with _ask(f"{self.name.rsplit('/', 1)[0]}/{what}") as answer:
                return json.loads(answer.read(_LARGEST_JSON))
        except (OSError, http.client.HTTPException, ValueError, RecursionError):
            return None


@contextmanager
def _lock(path: str) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
    with open(part, "wb") as file:
        while True:
            try:
                _receive(remote.url, file, progress)
                if progress.total in (None, progress.got):
                    break
                problem = f"{progress.got:,} of {progress.total:,} bytes came"
            except urllib.error.HTTPError as error:
                problem = f"the server says {error.code} {error.reason}"
                if error.code == 416:
                    progress.validator = ""  # nothing to go on with: from the beginning
                elif error.code not in _TRANSIENT:
                    raise UserError(f"{remote.name} cannot be downloaded: {problem}") from error
            except (OSError, http.client.HTTPException, ValueError) as error:
                if isinstance(error, OSError) and error.errno in _LOCAL:
                    raise
                problem = str(error) or type(error).__name__
            tries = 1 if progress.got > furthest else tries + 1
            furthest = max(furthest, progress.got)
            if tries >= TRIES:
                raise UserError(f"{remote.name} cannot be downloaded, tried {TRIES} times: {problem}")
            time.sleep(BACKOFF * 2 ** (tries - 1))
        file.flush()
        os.fsync(file.fileno())
    return progress.modified


def _receive(url: str, file: Any, progress: _Progress) -> None:
    """One answer of the server, appended to what came before if it is certain that it is the rest of the same file."""
    headers = {"Accept-Encoding": "identity"}
    if progress.got and progress.total and progress.validator:
        headers |= {"Range": f"bytes={progress.got}-", "If-Range": progress.validator}
    with _ask(url, headers) as answer:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        rest = answer.status == 206 and found and (int(found[1]), int(found[2])) == (progress.got, progress.total)
        if answer.status == 206 and not rest:
            progress.validator = ""
            raise ValueError(f"asked for the bytes from {progress.got:,} on, got {answer.headers.get('Content-Range')}")
        if not rest:
            length, tag = answer.headers.get("Content-Length"), answer.headers.get("ETag", "")
            changed = answer.headers.get("Last-Modified", "")
            progress.got, progress.total = 0, None if length is None else int(length)
            progress.validator = tag if tag.startswith('"') else changed  # a weak tag promises no equal bytes
            with suppress(ValueError):
                progress.modified = parsedate_to_datetime(changed).timestamp() if changed else None
            file.seek(0)
            file.truncate()
        while block := answer.read(1 << 20):
            file.write(block)
            progress.got += len(block)
