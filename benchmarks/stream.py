"""Samples per second of our stream, against raw webdataset on the same tars.

    make demo && .venv/bin/python benchmarks/stream.py

10,000 samples in four tars, made of the demo's real pictures, captions and conversations in a temporary folder. Both
sides shuffle, decode with the same function, and give batches of 16 with their pictures stacked; ours also checks
every sample, and every batch has its bookmark. Theirs batches in its workers, as its documentation asks for. The two
take turns, each after a warm-up, and the median of the ratios counts. Megatron-Energon takes a third turn if it is
installed.
"""

import importlib.util
import io
import itertools
import json
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image

from anymal.config.command_line import run_program
from anymal.config.schema import DataConfig
from anymal.data.packing import pack
from anymal.data.quarantine import Quarantine
from anymal.data.stream import Stream
from anymal.data_prep.demo.assets import cache_folder
from anymal.sample import Sample, Tokens

GOAL = 0.95  # of raw webdataset
SAMPLES, SHARDS, BATCH = 10_000, 4, 16
ROUNDS, SECONDS, WARM = 7, 1.5, 0.4


def demo_samples(modality: str) -> list[dict[str, bytes]]:
    """The members of every training sample of one of the demo's datasets, by suffix."""
    tars = sorted((cache_folder() / "data" / modality / "train").glob("*.tar"))
    if not tars:
        sys.exit("the demo's data are not there; run make demo first")
    found = []
    for sample in webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False):
        found.append({suffix: value for suffix, value in sample.items() if not suffix.startswith("__")})
    return found


def write(folder: Path, samples: list[dict[str, bytes]], *, n: int = SAMPLES, shards: int = SHARDS) -> Path:
    """`n` samples, `samples` again and again, in so many tars."""
    folder.mkdir()
    endless = itertools.cycle(samples)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:06d}.tar", "w") as tar:
            for i in range(shard * n // shards, (shard + 1) * n // shards):
                for suffix, data in next(endless).items():
                    info = tarfile.TarInfo(f"{i:09d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def texts() -> list[dict[str, bytes]]:
    """The demo's conversations without their media."""
    found = []
    for sample in demo_samples("conversations"):
        messages = json.loads(sample["json"])["messages"]
        for message in messages:
            if not isinstance(message["content"], str):
                message["content"] = [part for part in message["content"] if part["type"] == "text"]
        found.append({"json": json.dumps({"messages": messages}).encode()})
    return found


def picture(data: bytes) -> torch.Tensor:
    """[3, H, W] uint8."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


def tokens(key: str, text: str, media: list[torch.Tensor]) -> Tokens:
    """What both sides end with. Bytes stand for tokens: what a tokenizer costs is not the question here."""
    ids = list(text.encode())
    return Tokens(key=key, ids=ids, labels=ids, runs=[("image", 0, 1)] * len(media), media=media)


def our_sample(sample: Sample) -> Tokens:
    media = sample.media()
    text = "".join(part.content for message in sample.messages for part in message.parts if part.kind == "text")
    return tokens(sample.key, text, [picture(part.content) for part in media])


def their_sample(sample: dict[str, Any]) -> Tokens:
    if "jpg" in sample:
        return tokens(sample["__key__"], sample["txt"].decode(), [picture(sample["jpg"])])
    contents = [message["content"] for message in json.loads(sample["json"])["messages"]]
    parts = [c if isinstance(c, str) else "".join(part["text"] for part in c) for c in contents]
    return tokens(sample["__key__"], "".join(parts), [])


def ours(folder: Path, workers: int, bookmark: dict | None = None) -> Stream:
    """Endless rows of ours."""
    data = DataConfig(shards=str(folder), batch_size=BATCH, workers=workers)
    quarantine = Quarantine(None, max_in_a_row=0, max_share=0)
    parts = {"suffixes": {"jpg": "image"}, "prepare": our_sample, "quarantine": quarantine}
    return Stream(data, **parts, seed=0, bookmark=bookmark)


def our_batches(folder: Path, workers: int) -> Iterator[Any]:
    """The same, collated."""
    return (row.collate() for row in ours(folder, workers))


def theirs(folder: Path, workers: int, skip: int = 0) -> Iterator[Any]:
    """Endless batches of raw webdataset, after so many samples that are read but not decoded."""
    tars = sorted(str(tar) for tar in folder.glob("*.tar"))
    data = webdataset.WebDataset(tars, shardshuffle=100).repeat().shuffle(1000)
    data = data.slice(skip // max(1, workers), None).map(their_sample)
    return iter(webdataset.WebLoader(data.batched(BATCH, collation_fn=pack), batch_size=None, num_workers=workers))


def energon(folder: Path, workers: int) -> Iterator[Any]:
    """Endless batches of Megatron-Energon on the same tars, which it prepares first."""
    from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, get_loader, get_train_dataset, stateless
    from megatron.energon.flavors.webdataset import BaseWebdatasetFactory

    if not (folder / ".nv-meta").is_dir():
        names = [tar.name for tar in sorted(folder.glob("*.tar"))]
        BaseWebdatasetFactory.prepare_dataset(folder, names, split_parts_ratio=[("train", 1.0)], workers=1)
        described = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
        (folder / ".nv-meta" / "dataset.yaml").write_text(json.dumps(described))

    @stateless
    def cook(sample: dict[str, Any]) -> dict[str, Any]:
        return {**sample, "tokens": their_sample(sample)}

    class Encoder(DefaultTaskEncoder):
        decoder = None
        cookers = (Cooker(cook),)

        @stateless
        def batch(self, samples: list[dict[str, Any]]) -> Any:
            return pack([sample["tokens"] for sample in samples])

    config = WorkerConfig(rank=0, world_size=1, num_workers=workers)
    options = {"batch_size": BATCH, "shuffle_buffer_size": 1000, "max_samples_per_sequence": 100}
    return iter(get_loader(get_train_dataset(folder, worker_config=config, task_encoder=Encoder(), **options)))


def rate(batches: Iterator[Any]) -> float:
    """Samples per second, once what was read ahead while the other side had its turn is used up."""
    until = time.perf_counter() + WARM
    while time.perf_counter() < until:
        next(batches)
    n, start = 0, time.perf_counter()
    while time.perf_counter() < start + SECONDS:
        n += len(next(batches).keys)
    return n / (time.perf_counter() - start)


def compare(name: str, folder: Path, workers: int) -> dict[str, float]:
    """The median rates of one row of the table, and the median ratio of turns that followed one another."""
    makers = {"ours": our_batches, "webdataset": theirs}
    if importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.energon"):
        makers["energon"] = energon
    sides = {side: iter(make(folder, workers)) for side, make in makers.items()}
    rates = {side: [] for side in sides}
    for turn in range(ROUNDS):
        for side in list(sides)[:: 1 if turn % 2 else -1]:
            rates[side].append(rate(sides[side]))
    found = {}
    line = f"{name:16} {workers} workers: ours {median(rates['ours']):6.0f}/s"
    for side in list(sides)[1:]:
        ratios = [a / b for a, b in zip(rates["ours"], rates[side], strict=True)]
        found[side] = median(ratios)
        line += f"   {side} {median(rates[side]):6.0f}/s, ratio {found[side]:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    print(line, flush=True)
    return found


def main() -> None:
    """Print the table, and one line of figures."""
    torch.set_num_threads(1)
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, samples in (("images", demo_samples("image")), ("text", texts())):
            tars = write(Path(folder, name), samples)
            for workers in (0, 2):
                for side, ratio in compare(name, tars, workers).items():
                    figures[f"{name}_{workers}_workers_vs_{side}"] = ratio
    if not any(key.endswith("energon") for key in figures):
        print("energon: skipped, megatron-energon is not installed")
    met = all(ratio >= GOAL for key, ratio in figures.items() if key.endswith("webdataset"))
    print(*(f"{key}={ratio:.2f}" for key, ratio in figures.items()), f"goal={'met' if met else 'missed'}")


if __name__ == "__main__":
    run_program(main)
