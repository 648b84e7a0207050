"""The program behind `anymal encode`: a recipe's tars → feature tars, which hold features in place of media."""

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from anymal.checkpoints import networks
from anymal.checkpoints.build import load_encoder
from anymal.checkpoints.joined import find_start
from anymal.checkpoints.process import process_as_found
from anymal.config.command_line import parse_args
from anymal.config.schema import Config, DataConfig, encoder_learns
from anymal.config.stages import Recipe, encoder_names, left_behind, load_stages
from anymal.data import feature_cache, feature_codec, manifest, shards
from anymal.data.loader import each
from anymal.data.stream import tars
from anymal.errors import BadSample, UserError
from anymal.features.decode import DecodedSample, SampleDecoder
from anymal.features.report import Figures, report
from anymal.modality import Encoder
from anymal.model.llm import device
from anymal.model.multimodal import freeze_encoder, run_encoder
from anymal.model.registry import Registry


class Encode:
    """Writes the feature tars of a recipe's tars.

    Args:
        data: The recipe's data, with the precision as ``features``.
        encoders: Those whose features are written, by modality.
        suffixes: Which modality a shard member holds.
        device: What the encoders run on.
    """

    def __init__(
        self, data: DataConfig, encoders: dict[str, Encoder], suffixes: Mapping[str, str], device: torch.device
    ):
        self.data, self.encoders, self.suffixes, self.device = data, encoders, suffixes, device
        self.precision = data.features if data.features in feature_codec.PRECISIONS else "bf16"
        self.identities = {name: feature_codec.identity(encoder) for name, encoder in self.encoders.items()}
        for encoder in self.encoders.values():
            freeze_encoder(encoder, device)

    def written(self, tar: str, listed: dict[str, list[str]] | None = None) -> feature_cache.FeatureTar | None:
        """The feature tar that makes encoding the tar needless; None if there is none yet."""
        for one in feature_cache.find(tar, self.identities, [self.precision], {} if listed is None else listed):
            if set(self.identities) <= {*one.encoders, *one.header["looked_for"]}:
                return one
        return None

    def all_written(self, paths: list[str]) -> dict[str, feature_cache.FeatureTar]:
        """The feature tar of each tar that has one."""
        return {path: one for path in paths if (one := self.written(path)) is not None}

    def write(self, index: shards.Index, bar: tqdm, *, wait: bool) -> bool:
        """Write the feature tar of one tar; False if another process is at it, or was until now."""
        name = os.path.basename(index.path)
        folder = _writable(index.path)
        partial = folder / f".{name}.{feature_cache.folder_name(self.identities, self.precision)}.partial"
        with feature_cache.claim(str(partial), wait=wait) as file:
            if file is None:
                return False
            if self.written(index.path) is not None:  # written by another process since we looked
                partial.unlink()
                return False
            stamp, writer = feature_cache.stamp(index.path), feature_cache.Writer(file)
            figures: dict[str, Figures] = {}
            for read in self._samples(index, figures):
                writer.add(read.key, read.members)
                bar.update()
            identities = {kind: self.identities[kind] for kind in figures}
            if not identities:  # a tar without a medium of ours: its feature tar only says so
                file.truncate(0)
                file.seek(0)
                writer = feature_cache.Writer(file)
            if feature_cache.stamp(index.path) != stamp:
                raise UserError(f"{index.path} was changed while it was being encoded; start again")
            media = {kind: asdict(one) for kind, one in figures.items()}
            writer.finish(index.path, identities, self.precision, looked_for=sorted(self.identities), media=media)
            final = folder / feature_cache.folder_name(identities, self.precision) / name
            final.parent.mkdir(exist_ok=True)
            partial.replace(final)
        return True

    def _samples(self, index: shards.Index, figures: dict[str, Figures]) -> Iterator[DecodedSample]:
        """The samples of a tar in order, features in place of media; encoded a micro-batch of samples at a time."""
        decoders = {kind: encoder.decode for kind, encoder in self.encoders.items()}
        decoder = SampleDecoder(tar=index, suffixes=self.suffixes, decoders=decoders)
        read = each(len(index), decoder, self.data, on_crash=decoder.crashed, name=index.path)
        while window := list(islice(read, self.data.batch_size)):
            for kind in dict.fromkeys(kind for one in window for kind in one.kinds.values()):
                self._encode(kind, window, figures.setdefault(kind, Figures()))
            yield from window

    def _encode(self, kind: str, window: list[DecodedSample], figures: Figures) -> None:
        """Put the features of one modality's media into their members, at most ``data.batch_size`` at a time."""
        for one in window:
            figures.decode_s += one.seconds.get(kind, 0)
            figures.altered += one.altered.count(kind)
        mine = [(one, name) for one in window for name, modality in one.kinds.items() if modality == kind]
        good = [(one, name) for one, name in mine if name in one.media]
        figures.bad += len(mine) - len(good)
        for start in range(0, len(good), self.data.batch_size):
            chosen, began = good[start : start + self.data.batch_size], time.perf_counter()
            media = torch.stack([one.media.pop(name) for one, name in chosen])
            features = run_encoder(self.encoders[kind], media, self.device).float().cpu()
            figures.encode_s += time.perf_counter() - began
            for (one, name), exact in zip(chosen, features, strict=True):
                one.members[name] = _encoded(exact, self.precision, figures)


def _encoded(exact: Tensor, precision: str, figures: Figures) -> bytes:
    """The bytes of one medium's features, and how far what is read from them will be from `exact`."""
    try:
        feature_codec.check(exact, "the encoder's features")
    except BadSample as error:
        figures.bad += 1
        return feature_codec.dump_bad(str(error))
    data = feature_codec.dump(exact, precision)
    error = feature_codec.load(data, *exact.shape).double() - exact
    figures.media += 1
    figures.bytes += len(data)
    figures.largest_error = max(figures.largest_error, error.abs().max().item())
    figures.squared_error += error.square().sum().item()
    figures.squared += exact.double().square().sum().item()
    return data


def _writable(tar: str) -> Path:
    """The first of `anymal.data.feature_cache.folders` that a file can be made in."""
    why = ""
    for folder in map(Path, feature_cache.folders(tar)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
            why = f"{folder} (no permission)"
        except OSError as error:
            why = f"{folder} ({error.strerror or error})"
    raise UserError(f"features of {tar} cannot be written: neither beside it nor in {why}; set ANYMAL_CACHE")


def encode_all(encode: Encode, paths: list[str]) -> None:
    """Write what is missing: first the tars that nobody is at, then those that another process leaves behind."""
    listed: dict[str, list[str]] = {}
    missing = [shards.index(path) for path in paths if encode.written(path, listed) is None]
    missing = [index for index in missing if len(index)]
    print(f"{len(paths) - len(missing)} of {len(paths)} tars need no encoding, or are done")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    first = rank * len(missing) // world  # each process begins elsewhere
    every = 0.1 if sys.stderr.isatty() else 10.0
    written = 0
    with tqdm(total=sum(map(len, missing)), unit="sample", desc="encode", mininterval=every, smoothing=0.05) as bar:
        busy = []
        for index in missing[first:] + missing[:first]:
            if encode.written(index.path) is None:
                written += (done := encode.write(index, bar, wait=False))
                busy += [] if done else [index]
        for index in busy:
            while encode.written(index.path) is None:
                written += encode.write(index, bar, wait=True)
        rate = bar.format_dict["n"] / max(bar.format_dict["elapsed"], 1e-9)
    print(f"{written} tars encoded by this process, {rate:.1f} samples/s")


def frozen_encoders(stage: Config, registry: Registry, earlier: Sequence[Config] = ()) -> dict[str, Encoder]:
    """The encoders of a stage that stay as they are while it runs, with the weights that it will load.

    Says why others are left out: they learn, were not yet trained by an earlier stage, or show a medium in views.

    Args:
        stage: The stage, or a recipe without stages.
        registry: What it may name.
        earlier: The recipe's stages before it, which may not have run yet.

    Raises:
        UserError: The stage starts from a checkpoint that is not there, or an encoder cannot be loaded.
    """
    start = None
    if stage.model.checkpoint is not None:
        try:
            start = find_start(stage.model)
        except UserError:
            if not earlier:
                raise
    encoders: dict[str, Encoder] = {}
    starts = start.modalities if start else {}
    for name, modality in networks.encoders_of(stage.model.modalities, starts).items():
        if encoder_learns(name, stage.train):
            print(f"{name}: its encoder learns, so its features do not last")
        elif _awaited(stage, name, start, earlier):
            print(f"{name}: its encoder is yet to be trained by an earlier stage; start again after that")
        elif hasattr((encoder := load_encoder(registry, name, modality)).decode, "most_views"):
            print(f"{name}: how many views of a medium are seen depends on its sample; no features are written")
        else:
            encoders[name] = encoder
    networks.load_bare(encoders, starts)
    return encoders


def _awaited(stage: Config, name: str, start: networks.Start | None, earlier: Sequence[Config]) -> bool:
    """Whether an earlier stage has yet to train a modality's encoder, or one that it is made of."""
    if stage.model.checkpoint is not None and start is None:
        return any(encoder_learns(name, one.train) for one in earlier)
    to_be_trained = left_behind(earlier)
    return any(
        path in to_be_trained and not Path(path).is_dir()
        for path in encoder_names(stage.model.modalities[name].encoder)
    )


def encode_stage(stage: Recipe, registry: Registry, earlier: Sequence[Recipe], on: torch.device) -> None:
    """Encode what one stage's data lack, and say what it is worth."""
    names = list(dict.fromkeys(name for listed in tars(stage.data) for name in listed))
    every = manifest.survey(names, cache=stage.data.cache, cache_gb=stage.data.cache_gb).values()
    paths = [manifest.load(shard).path for shard in every if shard.count]  # remote tars are here from now on
    encoders = frozen_encoders(stage, registry, earlier)
    if not encoders:
        return
    encode = Encode(stage.data, encoders, registry.suffixes(), on)
    encode_all(encode, paths)
    if int(os.environ.get("RANK", 0)) == 0:
        print("\n".join(report(encode.all_written(paths), encode.encoders, encode.suffixes, encode.precision)))


@process_as_found()
def main(usage: str, registry: Registry) -> None:
    """Read the command line, and encode stage by stage."""
    stages = parse_args(Recipe, usage, more_help=registry.describe(), read=load_stages)
    on = device()
    if on.type == "cuda":
        on = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    for number, stage in enumerate(stages):
        if stage.stage:
            print(f"Stage {stage.stage}")
        encode_stage(stage, registry, stages[:number], on)
