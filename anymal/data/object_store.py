"""Tars in object stores (s3://, gs://) and on the Hugging Face hub (hf://datasets/OWNER/NAME/…), through fsspec.

Called by `remote` only, which keeps the cache. Endpoint, region, profile and credentials come from where each library
looks for them (AWS_PROFILE, AWS_ENDPOINT_URL, ~/.aws; gcloud's; HF_TOKEN, HF_ENDPOINT), or from fsspec's own
configuration (FSSPEC_S3_ANON=true, ~/.config/fsspec/*.json). None is a setting of ours, so none is in a recipe, and
nothing that a library says is passed on before addresses and secrets are out of it.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import fsspec

from anymal.config.settings import public_message
from anymal.errors import UserError, shortened

BLOCK = 1 << 24
"""Bytes of one request: what a cut connection loses at most, and what is in memory."""
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
"""States of HTTP after which it is worth asking again."""
INSTALL = {"s3": "pip install 'anymal[s3]'", "gs": "pip install 'anymal[gcs]'", "hf": "pip install huggingface_hub"}
"""The schemes, and how to get what reads them."""
_CREDENTIALS = {
    "s3": "give AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; of a public bucket, FSSPEC_S3_ANON=true",
    "gs": "log in (gcloud auth application-default login); of a public bucket, FSSPEC_GS_TOKEN=anon",
    "hf": "log in (hf auth login, or HF_TOKEN), and accept the dataset's licence if it has one",
}
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError")


class Refused(Exception):
    """The store says no, and would do so again."""


@dataclass(frozen=True, kw_only=True)
class About:
    """An object as it is now."""

    size: int
    """Bytes."""
    identity: str
    """Changes with its content."""
    modified: float | None
    """When it was changed, in seconds since 1970, if the store says so."""


def scheme_of(url: str) -> str:
    """An address's scheme if it is one of `INSTALL`, else empty."""
    scheme = url.partition("://")[0].lower()
    return scheme if scheme in INSTALL else ""


def require(scheme: str) -> None:
    """Import the library for a scheme.

    Raises:
        UserError: It is not; how to install it.
    """
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it is gRPC, which forked workers cannot use
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise UserError(f"{scheme}:// cannot be read: {error.__cause__ or error}; {INSTALL[scheme]}") from error


def about(url: str) -> About:
    """What the store says of an object.

    Raises:
        Refused: There is none, or it is not for us.
        ConnectionError: Anything that may be better the next time.
    """
    with _translated_errors(url):
        store, path = _store(url)
        store.invalidate_cache()  # what was said before does not count
        info = store.info(path)
    if info["type"] != "file":
        raise Refused("it is a folder")
    state = {name: str(info.get(name)) for name in ("size", "ETag", "LastModified", "generation", "blob_id")}
    commit = info.get("last_commit")  # of the hub
    modified = info.get("LastModified") or info.get("mtime") or getattr(commit, "date", None)
    seconds = modified.timestamp() if isinstance(modified, datetime) else None
    return About(size=info["size"], identity=json.dumps(state), modified=seconds)


def blocks(url: str, start: int) -> Iterator[bytes]:
    """The bytes of an object from `start` on.

    Raises:
        Refused, ConnectionError: As `about`.
    """
    with _translated_errors(url):
        store, path = _store(url)
        with store.open(path, "rb", block_size=BLOCK, cache_type="none") as file:
            file.seek(start)
            while block := file.read(BLOCK):
                yield block


def read(url: str, most: int) -> bytes:
    """The first `most` bytes of an object.

    Raises:
        Refused, ConnectionError: As `about`.
    """
    with _translated_errors(url):
        store, path = _store(url)
        with store.open(path, "rb", cache_type="none") as file:
            return file.read(most)


def _store(url: str) -> tuple[Any, str]:
    """The file system of an address, which fsspec keeps for each process, and the path in it."""
    scheme, _, rest = url.partition("://")
    scheme = scheme.lower()
    require(scheme)
    options = {"expand_info": True} if scheme == "hf" else {}  # else it lists the whole folder, and gives no date
    store = fsspec.filesystem(scheme, **options)  # not url_to_fs: that obeys a chain of addresses (zip::s3://…)
    return store, store._strip_protocol(f"{scheme}://{rest}")


@contextlib.contextmanager
def _translated_errors(url: str) -> Iterator[None]:
    """Libraries raise what they like; here it becomes one of two errors, without secrets."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = shortened(public_message(str(error).strip().partition("\n")[0]) or type(error).__name__)
        status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "code", None)
        if isinstance(error, FileNotFoundError):
            raise Refused(f"it is not there ({message})") from error
        if isinstance(error, PermissionError) or type(error).__name__ in _NO_CREDENTIALS or status in (401, 403):
            raise Refused(f"access is denied ({message}); {_CREDENTIALS[scheme_of(url)]}") from error
        if isinstance(status, int) and 400 <= status < 500 and status not in TRANSIENT:
            raise Refused(message) from error
        raise ConnectionError(message) from error
