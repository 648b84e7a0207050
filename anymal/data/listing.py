"""Which tars a recipe's ``shards`` names. The first step of the stream; no tar is opened.

No name is ever handed to a shell: the operating system opens it, or `remote` downloads it first, or nothing does.
"""

import os
import re
from pathlib import Path
from typing import Any

from braceexpand import braceexpand
from webdataset.shardlists import expand_urls

from anymal.config.settings import public_message, public_text
from anymal.data import remote
from anymal.errors import UserError

_PACKED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2?|txz)$")


def expand(shards: Any) -> list[str]:
    """The tars that a recipe's ``shards`` names: a path, a folder, an address, a pattern, or a list of these.

    Raises:
        UserError: One does not exist, is compressed, is a command or of another scheme, is listed twice, or there is
            none. What is behind an address is not looked at.
    """
    items = list(shards) if isinstance(shards, list | tuple) else [] if shards is None else [shards]
    paths = [path for item in items for path in _expand_one(os.fspath(item))]
    if not paths:
        raise UserError(
            "data.shards names no shard; it takes a path, a folder, an address, a pattern or a list of these"
        )
    twice = next((path for path in paths if paths.count(path) > 1), None) if len(set(paths)) < len(paths) else None
    if twice:
        raise UserError(
            f"{public_text(twice)} is listed twice; to see data more often, give it a ratio in data.datasets"
        )
    return paths


def _expand_one(name: str) -> list[str]:
    path = os.path.expanduser(name)
    if name.startswith("pipe:"):
        # not named in full: commands that fetch something hold what it takes to fetch it
        raise UserError("pipe:…: commands in the place of shards are never run; write their output to a tar first")
    if remote.is_url(name):
        return _expand_url(name)
    if os.path.isdir(path):
        tars = sorted(str(tar) for tar in Path(path).glob("*.tar"))
        if not tars:
            packed = any(_PACKED.search(entry) for entry in os.listdir(path))
            raise UserError(f"there is no .tar in {path}" + ("; decompress what is in there first" if packed else ""))
        return tars
    if os.path.isfile(path):
        if _PACKED.search(path):
            raise UserError(f"{path} is compressed, so that no sample can be read by its place; decompress it first")
        return [path]
    if os.path.exists(path):
        raise UserError(f"{path} is not a regular file: a pipe or a device has no places to read samples from")
    try:
        expanded = expand_urls(path)
    except ValueError as error:
        raise UserError(f"{name} is not a brace pattern: {error}") from error
    if expanded == [path]:
        raise UserError(f"there is no shard {path}")
    return [tar for item in expanded for tar in _expand_one(item)]


def _expand_url(name: str) -> list[str]:
    try:
        urls = list(braceexpand(name))
    except ValueError as error:
        raise UserError(public_message(f"{name} is not a brace pattern: {error}")) from error
    for url in urls:
        remote.check(url)
    return urls
