"""How this folder was made: by the code of version 0.1.0, the only one that it runs with (README.md says how).

Kept to be read. What it wrote is never made again.
"""

import io
import json
import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from anymal.stream import merge_bookmarks

import conftest
import launch.encode
import streams
import tiny_encoders
from adapters import load_encoder
from anymal.adapters import REGISTRY
from anymal.config import ModalityConfig
from anymal.features import identity
from small_runs import ROOT, go_back, losses, pretrain_here

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
import test_written_by_0_1 as test  # noqa: E402  what both need to know is said there

COLOURS = {"red": (220, 30, 20), "green": (20, 200, 40), "blue": (10, 40, 230), "grey": (128, 128, 128)}


def picture(i: int) -> bytes:
    """A small noisy picture of one colour."""
    from PIL import Image

    noise = np.random.default_rng(i).integers(-20, 20, (10 + i % 3, 12, 3))
    pixels = (np.array(list(COLOURS.values())[i % 4]) + noise).clip(0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def tone(i: int) -> bytes:
    """A second, or less, of a tone, low or high."""
    import soundfile

    time = np.arange(8000 + 800 * (i % 5)) / 16000
    wave = 0.4 * np.sin(2 * np.pi * (200 if i % 2 else 900) * time) + 0.1 * np.sin(2 * np.pi * 50 * (i + 3) * time)
    stream = io.BytesIO()
    soundfile.write(stream, wave.astype("float32"), 16000, format="FLAC", subtype="PCM_16")
    return stream.getvalue()


def conversation(i: int) -> dict:
    """A closed question about a picture and a tone."""
    answer = "yes" if (i % 4 == 0) == (i % 2 == 1) else "no"
    asked = [{"type": "image"}, {"type": "text", "text": "is it"}, {"type": "audio"}, {"type": "text", "text": "?"}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "options": ["yes", "no"]}


def shard(path: Path, samples: list[dict]) -> None:
    """A tar whose bytes and time are the same whenever it is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wds.TarWriter(str(path), mtime=0) as tar:
        for sample in samples:
            tar.write(sample)
    os.utime(path, ns=(test.TAR_TIME, test.TAR_TIME))


def write_data() -> None:
    """Two datasets of pairs, one of conversations, and one to be encoded."""
    named = list(COLOURS)
    pictures = [
        {"__key__": f"p{i:02d}", "png": picture(i), "txt": f"a {named[i % 4]} one{' indeed' * (i % 4)}"}
        for i in range(24)
    ]
    tones = [{"__key__": f"t{i:02d}", "flac": tone(i), "txt": "low" if i % 2 else "a high one"} for i in range(12)]
    for number, first in enumerate((0, 14)):
        shard(Path(f"data/pictures/{number:03d}.tar"), pictures[first : first + 14])
    shard(Path("data/tones/000.tar"), tones)
    talks = [{"__key__": f"c{i}", "png": picture(i), "flac": tone(i), "json": conversation(i)} for i in range(6)]
    shard(Path("data/conversations/000.tar"), talks)
    shard(Path("data/encoded/000.tar"), pictures[:8])
    Path("picture.png").write_bytes(picture(2))
    Path("tone.flac").write_bytes(tone(3))


def write_models() -> None:
    """A tiny LLM, and an encoder of each of two modalities."""
    conftest.make_llm(Path("models/llm"), width=32, layers=1)
    torch.manual_seed(0)
    tiny_encoders.clip_vision(Path("models/image"))
    torch.manual_seed(0)
    tiny_encoders.whisper(Path("models/audio"))


def stop_at(run: Path, step: int) -> None:
    """The folder of a finished run as it was when that step was saved, had the process ended then."""
    go_back(run, step)
    for folder in run.glob("checkpoints/step-*"):
        if folder.name != f"step-{step:08d}":
            shutil.rmtree(folder)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
    for name in ("throughput.json", "train.log"):
        (run / name).unlink(missing_ok=True)


def make_runs() -> dict:
    """Stopped runs; the losses that they go on with."""
    found = {}
    for name, step in test.RUNS.items():
        pretrain_here(Path(f"{name}.yaml"))
        found[name] = losses(Path("runs") / name)
        stop_at(Path("runs") / name, step)
        with tempfile.TemporaryDirectory() as other:  # it does go on with these
            shutil.copytree(".", Path(other) / "copy", symlinks=True)
            before = os.getcwd()
            os.chdir(Path(other) / "copy")
            pretrain_here(Path(f"{name}.yaml"))
            assert losses(Path("runs") / name) == found[name]
            os.chdir(before)
    return found


def make_features() -> dict:
    """Features of one shard at each precision; the losses of a run that reads them."""
    found = {}
    for precision in test.PRECISIONS:
        sys.argv = ["encode", "encoded.yaml", f"data.features={precision}"]
        launch.encode.main()
        pretrain_here(Path("encoded.yaml"), f"data.features={precision}", f"run.dir=runs/{precision}")
        found[precision] = losses(Path("runs") / precision)
        shutil.rmtree(f"runs/{precision}")
    return found


def make_identities() -> dict[str, str]:
    """The identity of every tiny encoder, by what it is."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (modality, make, options) in test.ENCODERS.items():
            config = ModalityConfig(encoder=make(Path(folder) / name.replace(" ", "/")), options=options)
            found[name] = identity(test.with_plain_weights(load_encoder(REGISTRY, modality, config)))
    return found


def make_bookmark(place: Path) -> tuple[dict, dict]:
    """Of two ranks, in mid-epoch; and what any number of ranks reads next."""
    open_stream = partial(test.numbers, place)
    pieces = []
    for rank, batches in enumerate((3, 3)):
        stream = open_stream(rank=rank, world=2)
        streams.batches(stream, batches)
        pieces.append(stream.bookmark)
    bookmark = json.loads(json.dumps(merge_bookmarks(pieces)))
    following = {
        str(world): [
            streams.keys(open_stream(rank=r, world=world, bookmark=bookmark), 12 // world) for r in range(world)
        ]
        for world in (1, 2, 3)
    }
    return bookmark, following


def main() -> None:
    """Write everything beside this file."""
    work = HERE / "work"
    (HERE / "recipes").mkdir()
    for recipe in (ROOT / "launch" / "recipes").glob("*.yaml"):
        shutil.copy(recipe, HERE / "recipes")
    os.chdir(work)
    write_models()
    write_data()
    expected = {"losses": make_runs(), "losses_from_features": make_features()}
    for path in work.rglob("*.index.json"):
        path.unlink()
    with tempfile.TemporaryDirectory() as other:
        copy = Path(other) / "copy"
        shutil.copytree(work, copy, symlinks=True)
        os.chdir(copy)
        expected |= test.answers(Path(other))
        with (HERE / "bookmark.json").open("w") as file:
            bookmark, expected["next_keys"] = make_bookmark(Path(other) / "numbers")
            json.dump(bookmark, file, indent=1)
        os.chdir(work)
    projectors = {kind: test.projected(kind) for kind in test.PROJECTORS}
    (HERE / "projectors.json").write_text(json.dumps(projectors) + "\n")
    (HERE / "identities.json").write_text(json.dumps(make_identities(), indent=1) + "\n")
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
