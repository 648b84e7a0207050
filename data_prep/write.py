"""The one writer of shards: samples in, a folder of WebDataset tars out.

    raw data ──(a reader)──▶ dicts ──write_shards──▶ FOLDER/000000.tar, 000001.tar, … ──▶ anymal.data.stream

A sample is a dict of tar members, named by their suffixes:

    __key__     unique within the dataset, without dots
    jpg, png, mp4, flac, imu.npy        media; several of a kind are numbered: 0.jpg, 1.jpg
    txt         the caption of a media-caption pair
    json        a conversation (below), or anything else that is worth keeping beside a pair

A conversation, and the optional answers of a closed question:

    {"messages": [{"role": "user", "content": [{"type": "image", "member": "0.jpg"}, {"type": "text", "text": "…"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "…"}]}],
     "options": ["…", "…"]}

The same samples give the same bytes, so shards can be compared by hash.
"""

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from anymal.errors import UserError
from anymal.files import whole_folder


def write_shards(folder: Path, samples: Iterable[dict[str, Any]], *, per_shard: int) -> int:
    """Write `samples` to numbered tars of `per_shard` samples (the last may have fewer), all of them or nothing.

    Member values may be bytes (kept as they are), str (UTF-8), numpy arrays (``.npy``), or anything that JSON holds.
    The samples' order is kept: shuffle them first if classes stand together.

    Returns:
        The number of samples written.

    Raises:
        UserError: A key is missing, repeated or holds a dot, a sample has no members, or there are no samples.
    """
    import webdataset as wds  # here, because it imports torch, which the worker processes have no use for

    keys: set[str] = set()
    with whole_folder(folder) as temporary:
        writer = None
        for sample in samples:
            key = sample.get("__key__", "")
            if not key or key in keys or "." in key or len(sample) < 2:
                raise UserError(f"{folder}: sample {key!r} needs a key of its own without dots, and members")
            keys.add(key)
            if writer is None:
                writer = wds.ShardWriter(
                    str(temporary / "%06d.tar"), maxcount=per_shard, mtime=0, encoder=False, verbose=0
                )
            writer.write({name: _encode(value) if name != "__key__" else value for name, value in sample.items()})
        if writer is None:
            raise UserError(f"{folder}: there are no samples to write")
        writer.close()
    return len(keys)


def read_shards(folder: Path) -> Iterator[dict[str, Any]]:
    """The samples of a folder of shards in order: members as bytes, ``json`` parsed. For data preparation and tests.

    It trusts the shards; training reads through `anymal.data.stream`, which does not.
    """
    import webdataset as wds

    for tar in sorted(folder.glob("*.tar")):
        for sample in wds.WebDataset(str(tar), shardshuffle=False, empty_check=False):
            yield sample | ({"json": json.loads(sample["json"])} if "json" in sample else {})


def _encode(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, np.ndarray):
        buffer = io.BytesIO()
        np.save(buffer, value, allow_pickle=False)
        return buffer.getvalue()
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()
