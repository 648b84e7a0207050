"""What a loader worker does for the feature cache: one sample of a tar → its members, its media decoded.

tar ──read_sample──▶ members ──decode──▶ `DecodedSample` ──▶ `anymal.features.encode`
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from anymal.data import feature_codec, shards
from anymal.data.loader import Bad, RawSample, read_sample, reason_of
from anymal.data.parse import modality_of, parse
from anymal.errors import UserError
from anymal.sample import Noted, Viewable, with_note


@dataclass(kw_only=True)
class DecodedSample:
    """One sample on its way into a feature tar."""

    key: str
    """Its key."""
    members: dict[str, bytes] = field(default_factory=dict)
    """By suffix in the feature tar, in its order; empty bytes for a medium that is not yet encoded."""
    media: dict[str, Tensor] = field(default_factory=dict)
    """Those media, by the same suffixes: what their encoder takes."""
    kinds: dict[str, str] = field(default_factory=dict)
    """The modality of each member that was a medium, by the same suffixes."""
    seconds: dict[str, float] = field(default_factory=dict)
    """For each modality, what reading and decoding took."""
    altered: list[str] = field(default_factory=list)
    """The modality of each medium that came with a note (`anymal.sample.Noted`)."""


@dataclass(frozen=True, kw_only=True)
class SampleDecoder:
    """What a worker does with sample `i` of a tar: read it and decode its media."""

    tar: shards.Index
    """The tar."""
    suffixes: Mapping[str, str]
    """Which modality a member holds."""
    decoders: dict[str, Callable[[bytes], Tensor | Noted | Viewable]]
    """By modality; members of other modalities are copied."""

    def __call__(self, i: int) -> DecodedSample | UserError:
        """A `UserError` is returned, as the stream's workers do."""
        result = read_sample(self.tar, i, self._decoded)
        if not isinstance(result, Bad):
            return result
        if not result.lasting:  # not the sample's fault, so its features must not say so
            return UserError(f"{self.tar.path} cannot be read: {result.reason}")
        return _unreadable(result.key, result.reason)

    def _decoded(self, raw: RawSample) -> DecodedSample:
        read = DecodedSample(key=raw.key)
        for name, data in raw.members.items():
            kind = modality_of(name, self.suffixes)
            if f".{name}".endswith(f".{feature_codec.ENDING}"):
                continue  # the feature tar's own names; no sample is good or bad by such a member
            if kind is None or kind not in self.decoders:
                read.members[name] = data
                continue
            began, cached = time.perf_counter(), f"{name}.{feature_codec.ENDING}"
            read.members[cached], read.kinds[cached] = b"", kind
            try:
                medium, note = with_note(self.decoders[kind](data))
                if isinstance(medium, Viewable):  # `frozen_encoders` passes over the encoders of such media
                    raise TypeError("media in views are not cached")
                read.media[cached] = medium
                read.altered += [kind] if note else []
            except Exception as error:  # as in the stream
                read.members[cached] = feature_codec.dump_bad(reason_of(error))
            read.seconds[kind] = read.seconds.get(kind, 0) + time.perf_counter() - began
        for kind in read.seconds:
            read.seconds[kind] += raw.seconds / len(read.seconds)
        if not read.members:
            parse(raw.shard, raw.key, raw.members, self.suffixes)  # there is neither text nor medium left: it refuses
        return read

    def crashed(self, i: int, reason: str) -> DecodedSample:
        """What the feature tar says of a sample over which a worker crashed."""
        return _unreadable(shards.name_of(self.tar.path, *self.tar.place(i)), reason)


def _unreadable(key: str, reason: str) -> DecodedSample:
    return DecodedSample(key=key, members={feature_codec.ENDING: feature_codec.dump_bad(reason)})
