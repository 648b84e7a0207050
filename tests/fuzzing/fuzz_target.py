"""What is attacked, by the way that production takes: a tar's survey, the stream's reader, real decoders and tokenizer.

    a.tar ──listing.expand, manifest.survey──▶ Shard ──loader.load──▶ Tokens, Bad or UserError ──▶ a complaint, or none

Two models are prepared for; their encoders are tiny, their processors, the decoders and the tokenizer real.
"""

import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import fuzz_arrays
import fuzz_clips
import fuzz_pictures
import fuzz_sounds
import fuzz_tars
import fuzz_texts
import torch
from fuzz_bytes import Case

import anymal  # noqa: F401  (makes torchaudio importable before transformers)
import tiny_encoders
from anymal.adapters import MODALITIES, REGISTRY
from anymal.checkpoints.build import build_adapters
from anymal.config.schema import DataConfig, ModalityConfig, ProjectorConfig, PromptConfig
from anymal.data import listing, manifest
from anymal.data.loader import Bad, Reader, Request, load, prepared
from anymal.data.prepare import Prepare, prepare
from anymal.data.quarantine import Quarantine
from anymal.errors import UserError
from anymal.sample import Features, Tokens
from conftest import make_llm

LONGEST_REASON = 500
CONTROL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
MAX_TOKENS = 2048
PROBED = 1 << 24  # bytes; Pillow itself takes a minute to open a JPEG of 131 MB of Exif
MOST = 1 << 30  # bad samples in a row
SUFFIXES = {suffix: name for name, modality in MODALITIES.items() for suffix in modality.suffixes}
MEDIA = fuzz_pictures.FORMATS | fuzz_clips.FORMATS | fuzz_sounds.FORMATS | fuzz_arrays.FORMATS
"""Formats of media."""
MAKERS = {
    "txt": fuzz_texts.make_txt,
    "json": fuzz_texts.make_json,
    "tar": fuzz_tars.make_tar,
    "index": fuzz_tars.make_index,
}
"""Makers of mutants of what is no medium."""
FORMATS = [*MEDIA, *MAKERS, "features"]
"""All that can be attacked."""
WEIGHTED = [*FORMATS, "mkv", "json", "tar", "index", "features"]
"""Formats as often as they are drawn."""
_TOO_MUCH = re.compile(r"MemoryError|can't allocate memory|bad_alloc|Unable to allocate")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


@dataclass(kw_only=True)
class Profile:
    """One model that samples are prepared for."""

    prepare: Prepare
    """Its decoders and its prompt."""
    shapes: dict[str, tuple[int, ...]]
    """Of one decoded medium of each modality."""


def _profile(folder: Path, encoders: dict[str, str], template: str, **options: dict) -> Profile:
    from transformers import AutoTokenizer

    configs = {
        name: ModalityConfig(encoder=encoder, projector=ProjectorConfig(tokens=4), options=options.get(name, {}))
        for name, encoder in encoders.items()
    }
    adapters = build_adapters(REGISTRY, configs, llm_width=16)
    tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
    made = prepare(tokenizer, adapters, PromptConfig(template=template), MAX_TOKENS)
    return Profile(prepare=made, shapes={name: tuple(adapter.encoder.shape) for name, adapter in adapters.items()})


def make_profiles(folder: Path) -> list[Profile]:
    """Two models that differ in whatever decoding depends on: tiles, rates, frames, template."""
    make_llm(folder / "llm")
    clip, imu = tiny_encoders.clip(folder / "clip"), tiny_encoders.imu(folder / "imu")
    clap = tiny_encoders.clap(folder / "clap")
    place = Path(clap, "preprocessor_config.json")  # 48 kHz, as the published CLAPs take it
    place.write_text(json.dumps(json.loads(place.read_text()) | {"sampling_rate": 48_000, "hop_length": 480}))
    rate = {"rate": 50.0}
    whisper, videomae = tiny_encoders.whisper(folder / "whisper"), tiny_encoders.videomae(folder / "videomae")
    first = {"image": clip, "video": clip, "audio": whisper, "imu": imu}
    second = {"image": tiny_encoders.dinov2(folder / "dinov2"), "video": videomae, "audio": clap, "imu": imu}
    tiles = {"tiles": "any_resolution"}
    return [
        _profile(folder, first, "chat", imu=rate),
        _profile(folder, second, "plain", imu=rate | {"rate": 100.0}, image=tiles),
    ]


class Target:
    """Makes mutants, and judges what becomes of them."""

    def __init__(self, folder: Path):
        self.profiles = make_profiles(folder)
        for medium in MEDIA.values():
            assert all(map(medium.probe, medium.seeds))

    def mutant(self, seed: int, kind: str, count: int) -> tuple[Case, Profile]:
        """The mutant of a format with a number, which depends on nothing else; and what it is prepared for."""
        rng = Random(f"{seed} {kind} {count}")
        profile = self.profiles[rng.random() < 0.25]
        if kind == "features":
            profile = self.profiles[0]
            return fuzz_arrays.make_features(rng, *profile.prepare.shapes["image"]), profile
        if kind in MAKERS:
            return MAKERS[kind](rng), profile
        data = MEDIA[kind].mutant(rng)
        members = {MEDIA[kind].suffix: data, "txt": b"a dog"}
        return Case(members=members, probe=lambda: len(data) < PROBED and MEDIA[kind].probe(data)), profile

    def complaint(self, case: Case, profile: Profile, path: Path) -> str:
        """What is wrong with what becomes of a case that lies at `path`; empty if nothing is."""
        try:
            (shard,) = manifest.survey(listing.expand(str(path.parent))).values()
            if shard.problem:
                return f"a problem of {len(shard.problem)} characters" * (len(shard.problem) >= LONGEST_REASON)
            cached = manifest.Shard(path=str(path.with_name("features")), count=1)
            use = partial(prepared, SUFFIXES, None, profile.prepare)
            reader = Reader([[shard]], use, {shard.path: cached} if case.cached else {})
            requests = [Request(position=i, dataset=0, shard=0, sample=i) for i in range(min(len(shard), 3))]
            for _, result in load(reader, requests, DataConfig(workers=0)):
                if said := self._judge(result, case, profile, path):
                    return said
        except UserError as error:
            return self._judge(error, case, profile, path)
        except BaseException as error:  # Rust's panics are no Exception
            return f"raises {type(error).__name__}: {error}"
        return ""

    def _judge(self, result: Any, case: Case, profile: Profile, path: Path) -> str:
        if isinstance(result, UserError):
            file = case.culprit or str(path.parent)
            return "" if file in str(result) else f"a UserError that does not name {file}: {result}"
        if isinstance(result, Bad):
            if _TOO_MUCH.search(result.reason):
                return f"too much memory: {result.reason}"
            log = path.with_name("quarantine.jsonl")
            Quarantine(log, max_in_a_row=MOST, max_share=1.0).reject(result.shard, result.key, result.reason)
            line = json.loads(log.read_text().splitlines()[-1])  # what people are told
            named = line["shard"] == str(path) and line["key"] and 0 < len(line["reason"]) < LONGEST_REASON
            return "" if named else f"a reason of {len(line['reason'])} characters: {line}"
        if not isinstance(result, Tokens):
            return f"neither tokens nor an error: {result!r}"
        return _shapes(result, profile) or _texts(result, case, profile)


def _shapes(tokens: Tokens, profile: Profile) -> str:
    """What is wrong with a good sample's sizes and numbers."""
    if not len(tokens.ids) == len(tokens.labels) <= MAX_TOKENS or len(tokens.media) != len(tokens.runs):
        return f"{len(tokens.ids)} ids, {len(tokens.labels)} labels, {len(tokens.media)} media, {len(tokens.runs)} runs"
    for medium, (modality, _, _) in zip(tokens.media, tokens.runs, strict=True):
        cached = isinstance(medium, Features)
        wanted = profile.prepare.shapes[modality] if cached else profile.shapes[modality]
        if tuple(medium.shape) != wanted:
            return f"a medium of {modality} is {list(medium.shape)}; wanted is {list(wanted)}"
        tensor = (medium.tensor if cached else medium).float()
        if not torch.isfinite(tensor.square().sum()):  # as the first norm or product will make it
            return f"a medium of {modality} is not finite, or its square is not: up to {tensor.abs().max():.3g}"
    return ""


def _texts(tokens: Tokens, case: Case, profile: Profile) -> str:
    """What is wrong with a good sample's text: control tokens that no template put there, NUL, surrogates."""
    tokenizer = profile.prepare.prompt.tokenizer
    media = {at for _, start, length in tokens.runs for at in range(start, start + length)}
    media |= {at for _, at in tokens.skips}
    ids = [token for at, token in enumerate(tokens.ids) if at not in media]
    started, ended, over = (ids.count(tokenizer.convert_tokens_to_ids(name)) for name in CONTROL)
    if case.tar:
        return ""
    roles, said = ["user", "assistant"], case.members.get("txt", b"").decode(errors="surrogatepass")
    if "json" in case.members and isinstance(described := json.loads(case.members["json"]), dict):
        turns = described.get("messages", [])
        roles = [turn["role"] for turn in turns] if "messages" in described else roles
        contents = [turn["content"] for turn in turns]
        parts = [part for c in contents for part in ([{"text": c}] if isinstance(c, str) else c)]
        said = "".join(part.get("text", "") for part in parts)
    chat = profile.prepare.prompt.config.template == "chat"
    wanted = (len(roles), len(roles)) if chat else (0, roles.count("assistant"))
    if (started, ended) != wanted or over:
        return f"its control tokens are {started}, {ended} and {over}; the template's are {wanted}"
    if found := _NO_TEXT.search(said):
        return f"its text holds {found.group()!r}"
    return ""
