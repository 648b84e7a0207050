"""A clip's bytes → frames spread evenly over it, the right ones: run in loader workers.

The packets are looked through first, which decodes nothing. Where every stored frame is shown and each group of
pictures stands alone, each frame to be shown is known by its time, and is decoded from the keyframe before it. Where
they are not (edit lists, i.e. a stream-copied cut; open groups of pictures; MPEG-TS), and where a frame is not found at
its time, the clip is decoded from start to end.

PyAV alone does it: decord and decord2 read beyond the end of a file whose index points there, and the process dies
(docs/log.md).
"""

import io
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from anymal.adapters.image.read import check_aspect
from anymal.errors import BadSample

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

CONTAINERS = {"mp4": "MP4 or MOV", "matroska": "Matroska or WebM", "avi": "AVI", "mpegts": "MPEG-TS", "mpeg": "MPEG-PS"}
"""FFmpeg's demuxers that are used. The one is chosen by the first bytes and no other is tried: FFmpeg also has demuxers
for playlists, which would open whatever files and addresses an untrusted clip names."""
MAX_FRAMES = 100_000
"""A clip with more frames than this is a bad sample, however short it claims to be."""


@dataclass(frozen=True)
class Index:
    """What the packets of a clip tell, without decoding."""

    container: str
    """A key of `CONTAINERS`."""
    frames: int
    """Frames to show."""
    times: list[int]
    """When each frame is shown, ascending, in the stream's time base; of frames without a time there is none."""
    keyframes: list[int]
    """Those of them at which decoding can begin, ascending."""
    ordinary: bool
    """Whether every stored frame is shown, each at a time of its own, and each group of pictures stands alone: then
    frames can be found by their times."""


def read_index(data: bytes, max_seconds: float, max_pixels: int) -> Index:
    """Look through a clip's headers and packets.

    Raises:
        BadSample: No video of a known container, cut off, or beyond the bounds.
    """
    import av

    container = _container(data)
    try:
        with av.open(io.BytesIO(data), "r", format=container) as file:
            if not file.streams.video:
                raise BadSample(f"a {CONTAINERS[container]} file without video")
            stream = file.streams.video[0]
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > max_pixels:
                raise BadSample(f"frames of {width} x {height} pixels; at most {max_pixels} are decoded (max_pixels)")
            check_aspect(width, height)
            index, end = _scan(file, stream, container)
            times = index.times
            seconds = float((times[-1] - times[0]) * (stream.time_base or 0)) if times else 0.0
            promised = (file.duration or 0) / av.time_base
            declared = stream.frames
    except BadSample:
        raise
    except Exception as error:  # FFmpeg's errors have a class each, and PyAV adds ValueError and others
        raise BadSample(f"{len(data)} bytes do not demux as {CONTAINERS[container]}: {error}") from error
    if not index.frames or len(times) < 0.9 * declared or (not declared and end < 0.9 * promised - 0.5):
        of = f"{declared} frames" if declared else f"{promised:.1f} s"
        raise BadSample(f"the clip is cut off: {index.frames} frames over {seconds:.1f} s are there of {of}")
    if seconds > max_seconds:
        raise BadSample(f"a clip of {seconds:.0f} s; at most {max_seconds:g} s are decoded (max_seconds)")
    return index


def _scan(file: "InputContainer", stream: "VideoStream", container: str) -> tuple[Index, float]:
    """Read every packet of an open file: its `Index`, and when the last packet of all ends, in seconds."""
    times: list[int] = []
    keyframes: list[int] = []
    shown, end = 0, 0.0
    ordinary = container in ("mp4", "matroska")
    for packet in file.demux():
        if packet.size == 0:  # the flush at the end
            continue
        if packet.pts is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream.index != stream.index:
            continue
        if packet.is_corrupt:
            raise BadSample("the clip is cut off or damaged: a packet is not whole")
        if packet.is_discard or packet.pts is None:  # cut away by an edit list, or without a time
            ordinary = False
        shown += not packet.is_discard
        if shown > MAX_FRAMES:
            raise BadSample(f"a clip of more than {MAX_FRAMES} frames")
        if packet.pts is not None:
            times.append(packet.pts)
            if packet.is_keyframe:
                keyframes.append(packet.pts)
            if not keyframes or packet.pts < keyframes[-1]:  # an open group: shown before the keyframe that it follows
                ordinary = False
    ordinary = ordinary and len(set(times)) == len(times)
    return Index(container, shown, sorted(times), sorted(keyframes), ordinary), end


def _container(data: bytes) -> str:
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"):
        return "mp4"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    if data[:1] == b"G" and data[188:189] == b"G":
        return "mpegts"
    if data[:4] == b"\x00\x00\x01\xba":
        return "mpeg"
    wanted = ", ".join(CONTAINERS.values())
    raise BadSample(f"{len(data)} bytes that begin with {data[:12]!r} are not a video; wanted is one of {wanted}")


def spread(frames: int, count: int) -> list[int]:
    """Positions of `count` frames among `frames`: the middles of equal stretches. A short clip repeats some."""
    return [(2 * i + 1) * frames // (2 * count) for i in range(count)]


def read_frames(data: bytes, count: int, max_seconds: float, max_pixels: int) -> list[np.ndarray]:
    """Decode `count` frames spread evenly over a clip.

    Returns:
        Arrays [height, width, 3] of uint8 RGB.

    Raises:
        BadSample: As `read_index`, or it does not decode.
    """
    index = read_index(data, max_seconds, max_pixels)
    wanted = spread(index.frames, count)
    frames = frames_by_seeking(data, wanted, index, max_pixels) if index.ordinary else None
    return frames or frames_from_start(data, wanted, index, max_pixels)


def frames_by_seeking(data: bytes, wanted: list[int], index: Index, max_pixels: int) -> list[np.ndarray] | None:
    """The `wanted` frames of an ordinary clip, each from the keyframe before it; None if one is not found at its time.

    Raises:
        BadSample: A frame is too large.
    """
    import av

    decoded: dict[int, np.ndarray] = {}  # by time
    try:
        with av.open(io.BytesIO(data), "r", format=index.container) as file:
            stream = file.streams.video[0]
            stream.codec_context.thread_count = 1  # the loader has a worker for each core already
            frames, reached = iter(()), None
            for time in sorted({index.times[position] for position in wanted}):
                keyframe = index.keyframes[bisect_right(index.keyframes, time) - 1]
                if reached is None or reached < keyframe:
                    file.seek(keyframe, stream=stream)
                    frames = file.decode(stream)
                frame = next((frame for frame in frames if frame.pts is None or frame.pts >= time), None)
                if frame is None or frame.pts != time:
                    return None
                decoded[time], reached = _upright(frame, max_pixels), time
    except BadSample:
        raise
    except Exception:  # FFmpeg's errors: decoding from the start then says whether the clip is bad
        return None
    return [decoded[index.times[position]] for position in wanted]


def _upright(frame: "VideoFrame", max_pixels: int) -> np.ndarray:
    """[height, width, 3] uint8 RGB, turned as the file says that it is to be shown."""
    if frame.width * frame.height > max_pixels:
        raise BadSample(f"a frame of {frame.width} x {frame.height} pixels; at most {max_pixels}")
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24", threads=1), frame.rotation // 90))


def frames_from_start(data: bytes, wanted: list[int], index: Index, max_pixels: int) -> list[np.ndarray]:
    """The `wanted` frames of any clip, by decoding it from the start.

    Raises:
        BadSample: It does not decode, or a tenth of its frames is missing.
    """
    import av

    kept: dict[int, np.ndarray] = {}
    decoded = 0
    try:
        with av.open(io.BytesIO(data), "r", format=index.container) as file:
            stream = file.streams.video[0]
            stream.codec_context.thread_count = 1  # as above
            for frame in file.decode(stream):
                if decoded in wanted:
                    kept[decoded] = _upright(frame, max_pixels)
                decoded += 1
                if decoded > wanted[-1]:
                    break
    except BadSample:
        raise
    except Exception as error:  # as above
        raise BadSample(f"the clip does not decode after {decoded} of {index.frames} frames: {error}") from error
    if not kept or decoded <= wanted[-1] - index.frames // 10:
        raise BadSample(f"only {decoded} of {index.frames} frames decode")
    last = kept[max(kept)]
    return [kept.get(position, last) for position in wanted]
