"""Streams over small tars of numbered samples, for the tests of what they give and of how they fail."""

import io
import json
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image

from anymal.config.schema import DataConfig
from anymal.data.quarantine import Quarantine
from anymal.data.stream import Stream
from anymal.errors import BadSample
from anymal.sample import Batch, Sample, Tokens

SUFFIXES = {"jpg": "image", "npy": "array"}


def write(path: Path, samples: list[dict]) -> Path:
    with webdataset.TarWriter(str(path)) as tar:
        for sample in samples:
            tar.write(sample)
    return path


def numbered(first: int, n: int) -> list[dict]:
    """Samples whose medium is their number."""
    return [{"__key__": f"{i:05d}", "npy": np.array([i]), "txt": f"{i}"} for i in range(first, first + n)]


def folder(path: Path, *counts: int) -> Path:
    """Shards of so many samples each, numbered through."""
    path.mkdir()
    for shard, n in enumerate(counts):
        write(path / f"{shard:03d}.tar", numbered(sum(counts[:shard]), n))
    return path


def prepare(sample: Sample) -> Tokens:
    """Decodes as adapters do: really, and with errors of any kind."""
    media = []
    for part in sample.media():
        if part.kind == "image":
            picture = Image.open(io.BytesIO(part.content))
            media.append(torch.from_numpy(np.asarray(picture.convert("RGB")).copy()))
        else:
            media.append(torch.from_numpy(np.load(io.BytesIO(part.content), allow_pickle=False)))
    text = sample.answer()
    if text.startswith("bad"):
        raise BadSample("says that it is bad")
    return Tokens(key=sample.key, ids=[len(text)], labels=[len(text)], runs=[], media=media)


def prepare_badly_by_thirds(sample: Sample) -> Tokens:
    if int(sample.key) % 3 == 0:
        raise ZeroDivisionError("a decoder's own error")
    return prepare(sample)


def collate(tokens: list[Tokens]) -> Batch:
    empty = torch.zeros(0)
    media = {"array": torch.cat([medium.flatten() for t in tokens for medium in t.media]) if tokens else empty}
    rest = dict.fromkeys(("ids", "positions", "offsets", "answer_positions", "targets", "answer_groups"), empty)
    return Batch(
        media=media,
        lengths=[],
        groups=[],
        media_positions={},
        counts={},
        skips={},
        keys=[t.key for t in tokens],
        **rest,
    )


def stream(
    shards,
    *,
    path=None,
    rows=10**9,
    share=1.0,
    seed=0,
    rank=0,
    world=1,
    bookmark=None,
    with_=prepare,
    modalities=None,
    **data,
):
    datasets = {"datasets": shards} if isinstance(shards, dict) else {"shards": str(shards)}
    config = DataConfig(**{"batch_size": 3, "shuffle": 8, "workers": 0, "timeout": 60} | data | datasets)
    quarantine = Quarantine(path, max_in_a_row=rows, max_share=share)
    options = {"seed": seed, "rank": rank, "world": world, "bookmark": bookmark, "modalities": modalities}
    return Stream(config, suffixes=SUFFIXES, prepare=with_, collate=collate, quarantine=quarantine, **options)


def batches(made: Stream, n: int) -> list[Batch]:
    found = []
    for batch in made:
        found.append(batch)
        if len(found) == n:
            return found


def keys(made: Stream, n: int) -> list[list[str]]:
    return [batch.keys for batch in batches(made, n)]


def samples(made: Stream, n: int) -> list[str]:
    """The keys of n batches, in one list."""
    return [key for batch in batches(made, n) for key in batch.keys]


def listed(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
