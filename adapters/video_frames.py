"""A clip's bytes → frames spread evenly over it, the right ones: the first room of `adapters.video`, used in workers.

decord is fast, but gives wrong frames without an error where the frames to show are not the frames stored: edit lists
(a stream-copied cut), open groups of pictures, MPEG-TS. So the packets are looked through first, which decodes
nothing; whatever is out of the ordinary, and whatever decord refuses (AV1), is decoded from start to end by PyAV.
A decord reader lives for one clip, in the worker: one that crosses a fork hangs.
"""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapters.image import check_aspect
from anymal.errors import BadSample

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
    ordinary: bool
    """Whether every stored frame is shown, and each group of pictures stands alone: then decord can be trusted."""


def read_index(data: bytes, max_seconds: float, max_pixels: int) -> Index:
    """Look through a clip's headers and packets.

    Raises:
        BadSample: No video of a known container, cut off, or beyond the bounds.
    """
    import av

    container = _container(data)
    try:
        with av.open(io.BytesIO(data), format=container) as file:
            if not file.streams.video:
                raise BadSample(f"a {CONTAINERS[container]} file without video")
            stream = file.streams.video[0]
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > max_pixels:
                raise BadSample(f"frames of {width} x {height} pixels; at most {max_pixels} are decoded (max_pixels)")
            check_aspect(width, height)
            index, times, end = _scan(file, stream, container)
            seconds = float((max(times) - min(times)) * stream.time_base) if times else 0.0
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


def _scan(file: Any, stream: Any, container: str) -> tuple[Index, list[int], float]:
    """Read every packet of an open file: its `Index`, its frames' times, and when the last packet of all ends."""
    times: list[int] = []
    shown, end, keyframe = 0, 0.0, None
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
        if packet.is_discard or packet.pts is None:  # cut away by an edit list, or without a place in time
            ordinary = False
        shown += not packet.is_discard
        if shown > MAX_FRAMES:
            raise BadSample(f"a clip of more than {MAX_FRAMES} frames")
        if packet.pts is not None:
            times.append(packet.pts)
            keyframe = packet.pts if packet.is_keyframe else keyframe
            if keyframe is None or packet.pts < keyframe:  # an open group: shown before the keyframe that it follows
                ordinary = False
    return Index(container, shown, ordinary), times, end


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
    frames = frames_by_decord(data, wanted, index.frames) if index.ordinary else None
    return frames or frames_by_pyav(data, wanted, index, max_pixels)


def frames_by_decord(data: bytes, wanted: list[int], total: int) -> list[np.ndarray] | None:
    """The `wanted` frames by seeking; None where decord is missing, refuses the clip or counts other than `total`."""
    import av  # noqa: F401  # first: decord's old libvpx would otherwise take the place of the one that av brings

    try:
        import decord
    except (ImportError, OSError):  # no wheel for this machine: PyAV does it all
        return None
    decord.logging.set_level(decord.logging.FATAL)
    try:
        reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
        return list(reader.get_batch(wanted).asnumpy()) if len(reader) == total else None
    except Exception:  # RuntimeError, DECORDError, AssertionError: PyAV then decides whether the clip is bad
        return None


def frames_by_pyav(data: bytes, wanted: list[int], index: Index, max_pixels: int) -> list[np.ndarray]:
    """The `wanted` frames by decoding from the start, upright as the file says that they are to be shown.

    Raises:
        BadSample: It does not decode, or a tenth of its frames is missing.
    """
    import av

    kept: dict[int, np.ndarray] = {}
    decoded = 0
    try:
        with av.open(io.BytesIO(data), format=index.container) as file:
            stream = file.streams.video[0]
            stream.codec_context.thread_count = 1  # the loader has a worker for each core already
            for frame in file.decode(stream):
                if decoded in wanted:
                    if frame.width * frame.height > max_pixels:
                        raise BadSample(f"a frame of {frame.width} x {frame.height} pixels; at most {max_pixels}")
                    turned = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                    kept[decoded] = np.ascontiguousarray(turned)
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
