"""Frames of a clip: the right ones, whichever way they are found; clips that are cut, hostile, too large or none."""

import io
import multiprocessing
import struct

import av
import numpy as np
import pytest

from anymal.adapters.video import frames as video_frames
from anymal.adapters.video.frames import frames_by_seeking, frames_from_start, read_frames, read_index, spread
from anymal.errors import BadSample
from tiny_encoders import clip_bytes, shade

BOUNDS = {"max_seconds": 600.0, "max_pixels": 1_000_000}


def _shades(frames):
    return [float(frame.mean()) for frame in frames]


def _both_ways(data, wanted):
    index = read_index(data, **BOUNDS)
    return frames_by_seeking(data, wanted, index, 10**6), frames_from_start(data, wanted, index, 10**6)


@pytest.mark.parametrize(
    ("kind", "codec", "options"),
    [
        ("mp4", "libx264", {}),
        ("mp4", "libx264", {"g": "12", "bf": "3"}),
        ("matroska", "libx264", {}),
        ("matroska", "libx264", {"g": "12", "bf": "3"}),
        ("webm", "libvpx-vp9", {}),
        ("webm", "libvpx", {"g": "12"}),
        ("mp4", "mpeg4", {"g": "12"}),
    ],
)
def test_seeking_and_decoding_from_the_start_agree_and_are_right(kind, codec, options):
    data, wanted = clip_bytes(60, kind=kind, codec=codec, **options), [0, 7, 29, 30, 30, 59]
    assert read_index(data, **BOUNDS).ordinary
    by_seeking, from_start = _both_ways(data, wanted)
    for ours, theirs in zip(by_seeking, from_start, strict=True):
        assert np.array_equal(ours, theirs)
    assert _shades(by_seeking) == pytest.approx([shade(i) for i in wanted], abs=5)


@pytest.mark.parametrize(
    ("kind", "codec", "options"),
    [
        ("mpegts", "libx264", {}),
        ("avi", "mpeg4", {}),
        ("mp4", "libx264", {"x264-params": "keyint=12:open-gop=1:bframes=3:scenecut=0"}),
    ],
)
def test_what_seeking_would_get_wrong_is_decoded_from_the_start(kind, codec, options, monkeypatch):
    monkeypatch.setattr(video_frames, "frames_by_seeking", lambda *_: pytest.fail("it was sought"))
    frames = read_frames(clip_bytes(60, kind=kind, codec=codec, **options), 5, **BOUNDS)
    assert _shades(frames) == pytest.approx([shade(i) for i in spread(60, 5)], abs=2)


def index_beyond_the_end(data: bytes) -> bytes:
    """A Matroska file that says its index of keyframes lies a terabyte further on: decord 0.6 and 3.4 die of it."""
    entry = data.index(bytes.fromhex("4dbb8c53ab841c53bb6b53ac82"))  # Seek: the place of Cues, in two bytes
    void = entry + 15
    assert data[void : void + 2] == b"\xec\x01", "what follows is empty space, its size in seven bytes"
    left = int.from_bytes(data[void + 2 : void + 9], "big") - 6
    longer = bytes.fromhex("4dbb9253ab841c53bb6b53ac88") + (1 << 40).to_bytes(8, "big")
    return data[:entry] + longer + b"\xec\x01" + left.to_bytes(7, "big") + data[void + 15 :]


def test_an_index_beyond_the_end_of_the_file_kills_nothing():
    whole = clip_bytes(20, kind="matroska", codec="mpeg4", g="10")
    hostile = index_beyond_the_end(whole)
    assert len(hostile) == len(whole) < 5000

    def decode() -> None:
        for ours, theirs in zip(read_frames(hostile, 4, **BOUNDS), read_frames(whole, 4, **BOUNDS), strict=True):
            assert np.array_equal(ours, theirs)

    process = multiprocessing.get_context("fork").Process(target=decode)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_frames_that_an_edit_list_cuts_away_are_not_shown():
    whole, cut = clip_bytes(60, g="30", bf="2"), io.BytesIO()
    with av.open(io.BytesIO(whole)) as source, av.open(cut, "w", format="mp4") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        start = int(0.7 / stream.time_base)
        for packet in source.demux(stream):  # what "ffmpeg -ss 0.7 -c copy" does: stored, but not to be shown
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - start, packet.dts - start, copy
                target.mux(packet)
    index = read_index(cut.getvalue(), **BOUNDS)
    assert (index.frames, index.ordinary) == (53, False)
    frames = read_frames(cut.getvalue(), 5, **BOUNDS)
    assert _shades(frames) == pytest.approx([shade(7 + i) for i in spread(53, 5)], abs=2)


def test_av1_is_decoded():
    if "libsvtav1" not in av.codecs_available:
        pytest.skip("this PyAV cannot write AV1")
    frames = read_frames(clip_bytes(12, codec="libsvtav1"), 3, **BOUNDS)
    assert _shades(frames) == pytest.approx([shade(i) for i in spread(12, 3)], abs=3)


def test_a_phones_rotation_is_applied():
    stream, bright = io.BytesIO(), np.zeros((48, 64, 3), np.uint8)
    bright[:24, :32] = 200
    with av.open(stream, "w", format="mp4") as file:
        track = file.add_stream("libx264", rate=10)
        track.width, track.height, track.pix_fmt = 64, 48, "yuv420p"
        file.mux([*track.encode(av.VideoFrame.from_ndarray(bright, format="rgb24")), *track.encode()])
    data = stream.getvalue()
    at = data.index(b"tkhd") + 44
    quarter = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)  # a quarter turn to the right
    (frame,) = read_frames(data[:at] + quarter + data[at + 36 :], 1, **BOUNDS)
    assert frame.shape == (64, 48, 3)
    assert frame[:32, 24:].mean() > 150 > 50 > frame[:32, :24].mean()


def test_frames_are_spread_evenly():
    assert spread(8, 4) == [1, 3, 5, 7]
    assert spread(100, 4) == [12, 37, 62, 87]
    assert spread(2, 4) == [0, 0, 1, 1], "a short clip repeats its frames"
    assert spread(1, 3) == [0, 0, 0]


@pytest.mark.parametrize("kind", ["mp4", "matroska"])
def test_cut_clips_are_bad_samples(kind):
    data = clip_bytes(200, kind=kind, movflags="faststart") if kind == "mp4" else clip_bytes(200, kind=kind)
    for share in (0.1, 0.5, 0.8):
        with pytest.raises(BadSample, match=r"cut off|do not demux"):
            read_frames(data[: int(share * len(data))], 4, **BOUNDS)


def test_bounds_of_a_clip():
    data = clip_bytes(30)
    with pytest.raises(BadSample, match=r"a clip of 3 s; at most 2 s"):
        read_frames(data, 4, max_seconds=2.0, max_pixels=10**6)
    with pytest.raises(BadSample, match=r"64 x 48 pixels; at most 1000"):
        read_frames(data, 4, max_seconds=600.0, max_pixels=1000)


def test_a_sound_is_no_clip():
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as file:
        track = file.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        file.mux([*track.encode(frame), *track.encode()])
    with pytest.raises(BadSample, match="without video"):
        read_frames(stream.getvalue(), 4, **BOUNDS)
