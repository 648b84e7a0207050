"""Encode a recipe's media once, so that training reads features in place of media (see docs/features.md).

    python launch/encode.py launch/recipes/demo-pretrain.yaml
    python launch/encode.py launch/recipes/demo-pretrain.yaml data.features=int8     # half the bytes, a stated error
    torchrun --nproc_per_node 8 launch/encode.py launch/recipes/anymal-image-8b.yaml data.shards=/data/laion

Takes the recipe of the training run and looks at its data and encoders only. Start it several times, on several
machines that share the data's file system, and they share the work. Started again, it goes on with what is missing.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from adapters import describe_options, load_encoder
from anymal import features, manifest, shards, twins
from anymal.command_line import parse_args
from anymal.config import Config
from anymal.errors import BadSample, UserError
from anymal.model import place_encoder, run_encoder
from anymal.parse import modality_of, parse
from anymal.sample import Viewable
from anymal.stream import tars
from anymal.workers import each, reason_of
from launch.build import device, run_program, suffixes

NOT_FINITE = "the encoder's features hold NaN or infinite values"
REREAD = 1000
"""Samples that are read again in the end, to measure what that costs."""


@dataclass(kw_only=True)
class Figures:
    """What was seen of one modality: sums over its media."""

    media: int = 0
    """That were encoded."""
    bad: int = 0
    """That could not be."""
    decode_s: float = 0.0
    """Reading and decoding the originals, seconds of a worker."""
    encode_s: float = 0.0
    """Running the encoder, seconds."""
    bytes: int = 0
    """Of features as they are written."""
    largest_error: float = 0.0
    """Of any value that was written, against the encoder's own."""
    squared_error: float = 0.0
    """Sum over all values."""
    squared: float = 0.0
    """Sum of the squares of the encoder's values."""

    def add(self, other: "Figures") -> None:
        """Take another's into account."""
        for name, value in asdict(other).items():
            mine = getattr(self, name)
            setattr(self, name, max(mine, value) if name == "largest_error" else mine + value)

    def relative_error(self) -> float:
        """Root of the mean squared error over that of the mean square of the values."""
        return (self.squared_error / self.squared) ** 0.5 if self.squared else 0.0


@dataclass(kw_only=True)
class Read:
    """One sample on its way into a twin."""

    key: str
    """Its key."""
    members: dict[str, bytes | Tensor] = field(default_factory=dict)
    """By suffix in the twin; a tensor is what an encoder has yet to see."""
    kinds: dict[str, str] = field(default_factory=dict)
    """The modality of each member that was a medium."""
    seconds: dict[str, float] = field(default_factory=dict)
    """For each modality, what reading and decoding took."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """What a worker does with sample `i` of a tar: read it and decode its media."""

    tar: shards.Index
    """The tar."""
    suffixes: dict[str, str]
    """Which modality a member holds."""
    decoders: dict[str, Callable[[bytes], Tensor]]
    """By modality; members of other modalities are copied."""

    def __call__(self, i: int) -> Read | UserError:
        """A `UserError` is returned, as the stream's workers do."""
        place, began = self.tar.place(i), time.perf_counter()
        try:
            if i in self.tar.bad:
                raise BadSample(self.tar.bad[i])
            key, members = shards.read(self.tar.path, *place)
        except BadSample as error:
            return _unreadable(shards.name_of(self.tar.path, *place), str(error))
        except OSError as error:  # not the sample's fault, so not to be remembered of it
            return UserError(f"{self.tar.path} cannot be read: {error.strerror or error}")
        read, reading = Read(key=key), time.perf_counter() - began
        for name, data in members.items():
            kind = modality_of(name, self.suffixes)
            if f".{name}".endswith(f".{features.ENDING}"):
                continue  # the twin's own names; no sample is good or bad by such a member
            if kind not in self.decoders:
                read.members[name] = data
                continue
            began = time.perf_counter()
            try:
                found = self.decoders[kind](data)
                if isinstance(found, Viewable):
                    raise UserError(f"{kind}: features of media in several views are not written; leave it out")
            except UserError as error:
                return error
            except Exception as error:  # as in the stream
                found = features.dump_bad(reason_of(error))
            read.members[f"{name}.{features.ENDING}"] = found
            read.kinds[f"{name}.{features.ENDING}"] = kind
            read.seconds[kind] = read.seconds.get(kind, 0) + time.perf_counter() - began
        for kind in read.seconds:
            read.seconds[kind] += reading / len(read.seconds)
        if read.members:
            return read
        try:
            parse(self.tar.path, key, members, self.suffixes)  # there is neither text nor medium left: it will refuse
        except BadSample as error:
            return _unreadable(key, str(error))


def _unreadable(key: str, reason: str) -> Read:
    return Read(key=key, members={features.ENDING: features.dump_bad(reason)})


class Encode:
    """Writes the twins of a recipe's tars.

    Args:
        config: The recipe: data, modalities, and the precision as ``data.features``.
        place: The device that the encoders run on.
    """

    def __init__(self, config: Config, place: torch.device):
        self.data, self.place = config.data, place
        self.precision = "bf16" if config.data.features in ("auto", "never") else config.data.features
        self.encoders = {name: load_encoder(name, modality) for name, modality in config.model.modalities.items()}
        self.identities = {name: features.identity(encoder) for name, encoder in self.encoders.items()}
        for encoder in self.encoders.values():
            place_encoder(encoder, place)

    def twin(self, tar: str, listed: dict[str, list[str]] | None = None) -> twins.Twin | None:
        """The twin that makes encoding the tar needless."""
        for found in twins.find(tar, self.identities, self.precision, {} if listed is None else listed):
            if set(self.identities) <= {*found.encoders, *found.header["looked_for"]}:
                return found
        return None

    def write(self, index: shards.Index, bar: tqdm, *, wait: bool) -> bool:
        """Write the twin of one tar; False if another process is at it, or was until now."""
        name = os.path.basename(index.path)
        place = _writable(index.path)
        partial = place / f".{name}.{twins.folder_name(self.identities, self.precision)}.partial"
        with twins.claim(str(partial), wait=wait) as file:
            if file is None:
                return False
            if self.twin(index.path) is not None:  # written by another process since we looked
                partial.unlink()
                return False
            stamp, figures, writer = twins.stamp(index.path), {}, twins.Writer(file)
            for read in self._samples(index, figures):
                writer.add(read.key, read.members)
                bar.update()
            held = {kind: self.identities[kind] for kind in figures}
            if not held:  # a tar without a medium of ours: its twin only says so
                file.truncate(0)
                file.seek(0)
                writer = twins.Writer(file)
            if twins.stamp(index.path) != stamp:
                raise UserError(f"{index.path} was changed while it was being encoded; start again")
            media = {kind: asdict(one) for kind, one in figures.items()}
            writer.finish(index.path, held, self.precision, looked_for=sorted(self.identities), media=media)
            final = place / twins.folder_name(held, self.precision) / name
            final.parent.mkdir(exist_ok=True)
            partial.replace(final)
        return True

    def _samples(self, index: shards.Index, figures: dict[str, Figures]) -> Iterator[Read]:
        """Every sample of a tar with nothing but bytes in it, in order, encoded a micro-batch of samples at a time."""
        decoders = {kind: encoder.decode for kind, encoder in self.encoders.items()}
        reader = Reader(tar=index, suffixes=suffixes(), decoders=decoders)
        read = each(len(index), reader, self.data)
        while window := list(islice(read, self.data.batch_size)):
            for kind in dict.fromkeys(kind for one in window for kind in one.kinds.values()):
                self._encode(kind, window, figures.setdefault(kind, Figures()))
            yield from window

    def _encode(self, kind: str, window: list[Read], figures: Figures) -> None:
        """Put features in the place of one modality's tensors, at most ``data.batch_size`` at a time."""
        for one in window:
            figures.decode_s += one.seconds.get(kind, 0)
        mine = [(one, name) for one in window for name, found in one.kinds.items() if found == kind]
        good = [(one, name) for one, name in mine if isinstance(one.members[name], Tensor)]
        figures.bad += len(mine) - len(good)
        for start in range(0, len(good), self.data.batch_size):
            chosen, began = good[start : start + self.data.batch_size], time.perf_counter()
            media = torch.stack([one.members[name] for one, name in chosen])
            made = run_encoder(self.encoders[kind], media, self.place).float().cpu()
            figures.encode_s += time.perf_counter() - began
            for (one, name), exact in zip(chosen, made, strict=True):
                one.members[name] = _written(exact, self.precision, figures)


def _written(exact: Tensor, precision: str, figures: Figures) -> bytes:
    """The bytes of one medium's features, and how far what is read from them will be from `exact`."""
    if not torch.isfinite(exact).all():
        figures.bad += 1
        return features.dump_bad(NOT_FINITE)
    data = features.dump(exact, precision)
    error = features.load(data, *exact.shape).double() - exact
    figures.media += 1
    figures.bytes += len(data)
    figures.largest_error = max(figures.largest_error, error.abs().max().item())
    figures.squared_error += error.square().sum().item()
    figures.squared += exact.double().square().sum().item()
    return data


def _writable(tar: str) -> Path:
    """The first of `twins.places` that a file can be made in."""
    why = ""
    for place in map(Path, twins.places(tar)):
        try:
            place.mkdir(parents=True, exist_ok=True)
            if os.access(place, os.W_OK):
                return place
            why = "no permission"
        except OSError as error:
            why = error.strerror or str(error)
    raise UserError(f"features of {tar} cannot be written: neither beside it nor in {place} ({why}); set ANYMAL_CACHE")


def encode_all(encode: Encode, paths: list[str]) -> None:
    """Write what is missing: first the tars that nobody is at, then those that another process leaves behind."""
    listed: dict[str, list[str]] = {}
    missing = [shards.index(path) for path in paths if encode.twin(path, listed) is None]
    missing = [index for index in missing if len(index)]
    print(f"{len(paths) - len(missing)} of {len(paths)} tars need no encoding, or are done")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    first = rank * len(missing) // world  # each process begins elsewhere
    every = 0.1 if sys.stderr.isatty() else 10.0
    written = 0
    with tqdm(total=sum(map(len, missing)), unit="sample", desc="encode", mininterval=every, smoothing=0.05) as bar:
        busy = []
        for index in missing[first:] + missing[:first]:
            if encode.twin(index.path) is None:
                written += (done := encode.write(index, bar, wait=False))
                busy += [] if done else [index]
        for index in busy:
            while encode.twin(index.path) is None:
                written += encode.write(index, bar, wait=True)
        rate = bar.format_dict["n"] / max(bar.format_dict["elapsed"], 1e-9)
    print(f"{written} tars encoded by this process, {rate:.1f} samples/s")


# --------------------------------------------------------------------------------------------------- what it costs


def seconds_to_read(encode: Encode, found: list[tuple[str, twins.Twin]]) -> dict[str, float]:
    """Modality → seconds for reading one medium's features, over about `REREAD` samples of all twins."""
    seconds, counts = dict.fromkeys(encode.encoders, 0.0), dict.fromkeys(encode.encoders, 0)
    indexes = [shards.index(twin.path) for _, twin in found if twin.encoders]
    for index in indexes:
        for i in range(0, len(index), max(1, len(index) * len(indexes) // REREAD)):
            began = time.perf_counter()
            try:
                members = features.restore(shards.read(index.path, *index.place(i))[1])
            except BadSample:
                continue
            reading = time.perf_counter() - began
            stored = {name: data for name, data in members.items() if isinstance(data, features.Stored)}
            for name, data in stored.items():
                kind, began = modality_of(name, suffixes()), time.perf_counter()
                with suppress(BadSample):
                    features.load(data, encode.encoders[kind].tokens, encode.encoders[kind].width)
                seconds[kind] += reading / len(stored) + time.perf_counter() - began
                counts[kind] += 1
    return {kind: seconds[kind] / count for kind, count in counts.items() if count}


def report(encode: Encode, paths: list[str]) -> list[str]:
    """What the twins of all these tars hold, how exact it is, and whether reading them is cheaper than encoding."""
    found = [(path, twin) for path in paths if (twin := encode.twin(path)) is not None]
    total: dict[str, Figures] = {}
    for _, twin in found:
        for kind, figures in twin.header["media"].items():
            total.setdefault(kind, Figures()).add(Figures(**figures))
    threads, lines = torch.get_num_threads(), []
    torch.set_num_threads(1)  # as in the loader's workers
    reading = seconds_to_read(encode, found)
    torch.set_num_threads(threads)
    for kind, figures in total.items():
        lines.append(
            f"{kind}: {figures.media:,} media, {figures.bad:,} bad; {figures.bytes / 1e6:,.1f} MB as "
            f"{encode.precision}; error {figures.largest_error:.3g} at most, rel. RMS {figures.relative_error():.2e}"
        )
        if not figures.media or kind not in reading:
            continue
        again, decode = figures.encode_s / figures.media, figures.decode_s / (figures.media + figures.bad)
        ratio = (again + decode) / reading[kind]
        lines.append(
            f"  for 1,000 media: encoding again costs {1000 * again:.2f} s, decoding and reading the original "
            f"{1000 * decode:.2f} s, reading features {1000 * reading[kind]:.2f} s: "
            + (f"the features pay, {ratio:.1f} times less" if ratio > 1 else f"they do not pay ({ratio:.2f})")
        )
    originals = sum(os.path.getsize(path) for path, twin in found if twin.encoders)
    written = sum(os.path.getsize(twin.path) for _, twin in found if twin.encoders)
    return [*lines, f"{written / 1e6:,.1f} MB of twins beside {originals / 1e6:,.1f} MB of tars"]


def main() -> None:
    """Read the command line, encode what is missing, and say what it is worth."""
    config = parse_args(Config, __doc__, more_help=describe_options())
    names = list(dict.fromkeys(name for listed in tars(config.data) for name in listed))
    every = manifest.survey(names, cache=config.data.cache, cache_gb=config.data.cache_gb).values()
    paths = [manifest.load(shard).path for shard in every if shard.count]  # remote tars are here from now on
    place = device()
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    encode = Encode(config, place)
    encode_all(encode, paths)
    if int(os.environ.get("RANK", 0)) == 0:
        print("\n".join(report(encode, paths)))


if __name__ == "__main__":
    run_program(main)
