"""What each modality does with its own formats: pictures, clips, sounds and motion, good and bad."""

import io
import json
import struct

import av
import numpy as np
import pytest
import torch

import tiny_encoders as tiny
from adapters import audio, image, imu, video, video_frames
from adapters.audio import AudioOptions, load_audio_encoder, read_sound
from adapters.image import ImageOptions, load_image_encoder, read_image
from adapters.imu import IMUOptions, load_imu_encoder, read_recording
from adapters.signals import crop_centre, hold_last, resample
from adapters.video import VideoOptions, load_video_encoder
from adapters.video_frames import frames_by_decord, frames_by_pyav, read_frames, read_index, spread
from anymal.errors import BadSample, UserError
from tiny_encoders import clip_bytes, motion, npy, picture, shade, sound

BOUNDS = {"max_seconds": 600.0, "max_pixels": 1_000_000}


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGB", "JPEG"), ("L", "PNG"), ("CMYK", "JPEG"), ("P", "GIF"), ("1", "PNG")]
)
def test_pictures_of_any_mode_become_rgb(mode, kind):
    decoded = read_image(picture(mode, kind=kind), 10_000)
    assert (decoded.mode, decoded.size) == ("RGB", (48, 40))


def test_transparent_becomes_white():
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(stream, "PNG")
    assert read_image(stream.getvalue(), 100).getpixel((3, 3)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped():
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8), 128 * 256, np.uint16)).save(stream, "PNG")
    assert read_image(stream.getvalue(), 100).getpixel((3, 3)) == (128, 128, 128)


def test_orientation_of_a_photo_is_applied():
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    assert read_image(picture(kind="JPEG", exif=exif), 10_000).size == (40, 48)


def test_large_and_long_pictures_are_refused_by_their_header():
    with pytest.raises(BadSample, match=r"10000 x 10000 pixels; at most 64000000"):
        read_image(tiny.png_header(10_000, 10_000), 64_000_000)
    with pytest.raises(BadSample, match=r"too many pixels"):
        read_image(tiny.png_header(40_000, 40_000), 64_000_000)
    with pytest.raises(BadSample, match=r"60000 x 1 pixels; its sides may differ by a factor of 50"):
        read_image(tiny.png_header(60_000, 1), 64_000_000)


def test_program_starting_formats_are_refused():
    with pytest.raises(BadSample, match="no whole picture"):
        read_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", 10_000)


def test_clip_gives_the_patches_of_the_last_layer_but_one(tmp_path):
    from transformers import CLIPModel

    encoder = load_image_encoder(tiny.clip(tmp_path), ImageOptions())
    pixels = encoder.decode(picture())[None]
    with torch.no_grad():
        states = CLIPModel.from_pretrained(tmp_path).vision_model(pixels, output_hidden_states=True).hidden_states
    assert torch.allclose(encoder(pixels), states[-2][:, 1:], atol=1e-6)
    last = load_image_encoder(str(tmp_path), ImageOptions(layer=-1))
    assert torch.allclose(last(pixels), states[-1][:, 1:], atol=1e-6)
    assert not any("text" in name for name, _ in encoder.named_parameters())
    with pytest.raises(UserError, match="only 3 layers"):
        load_image_encoder(str(tmp_path), ImageOptions(layer=-9))


def test_dinov2_and_siglip_give_their_patches(tmp_path):
    from transformers import Dinov2Model, Siglip2VisionModel, SiglipVisionModel

    for make, cls, skip in ((tiny.dinov2, Dinov2Model, 1), (tiny.siglip, SiglipVisionModel, 0)):
        encoder = load_image_encoder(make(tmp_path / cls.__name__), ImageOptions())
        pixels = encoder.decode(picture())[None]
        with torch.no_grad():
            expected = cls.from_pretrained(tmp_path / cls.__name__)(pixels).last_hidden_state[:, skip:]
        assert encoder.tokens == 16
        assert torch.allclose(encoder(pixels), expected, atol=1e-6)
    encoder = load_image_encoder(tiny.siglip2(tmp_path / "naflex"), ImageOptions())
    made = encoder.decode.processor(images=read_image(picture(size=(40, 40)), 10_000), return_tensors="pt")
    with torch.no_grad():
        expected = Siglip2VisionModel.from_pretrained(tmp_path / "naflex")(**made).last_hidden_state
    assert torch.allclose(encoder(encoder.decode(picture(size=(40, 40)))[None]), expected, atol=1e-6)
    assert encoder.decode(picture(size=(90, 30))).shape == encoder.decode(picture()).shape


def test_efficientnet_lite0_has_the_published_size():
    from adapters.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel

    model = EfficientNetLiteModel(EfficientNetLiteConfig()).eval()
    assert sum(p.numel() for p in model.parameters()) == 4_652_008
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 224, 224)).last_hidden_state.shape == (1, 1280, 7, 7)
        assert model.classify(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)


def test_same_padding_is_tensorflows():
    from adapters.efficientnet_lite import SameConv2d

    conv = SameConv2d(1, 1, 3, stride=2)
    torch.nn.init.ones_(conv.weight)
    row = torch.arange(1.0, 5.0).expand(1, 1, 4, 4)  # nothing on the left, one zero on the right
    assert torch.equal(conv(row)[0, 0, 0], torch.tensor([18.0, 21.0]))


def test_missing_weights_are_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny.dinov2(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.1.mlp.fc1.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights of its encoder, such as encoder.layer.1.mlp.fc1.weight"):
        load_image_encoder(str(tmp_path), ImageOptions())


# --- video ------------------------------------------------------------------------------------------------------------


def _shades(frames):
    return [float(frame.mean()) for frame in frames]


def _both_ways(data, wanted):
    index = read_index(data, **BOUNDS)
    return frames_by_decord(data, wanted, index.frames), frames_by_pyav(data, wanted, index, 10**6)


@pytest.mark.parametrize(
    ("kind", "codec", "options"),
    [
        ("mp4", "libx264", {}),
        ("mp4", "libx264", {"g": "12", "bf": "3"}),
        ("matroska", "libx264", {}),
        ("webm", "libvpx-vp9", {}),
        ("mp4", "mpeg4", {}),
    ],
)
def test_decord_and_pyav_agree_and_are_right(kind, codec, options):
    pytest.importorskip("decord")
    data, wanted = clip_bytes(60, kind=kind, codec=codec, **options), [0, 7, 29, 30, 59]
    assert read_index(data, **BOUNDS).ordinary
    by_decord, by_pyav = _both_ways(data, wanted)
    for ours, theirs in zip(by_decord, by_pyav, strict=True):
        assert np.array_equal(ours, theirs)
    assert _shades(by_pyav) == pytest.approx([shade(i) for i in wanted], abs=5)


@pytest.mark.parametrize(
    ("kind", "codec", "options"),
    [
        ("mpegts", "libx264", {}),
        ("avi", "mpeg4", {}),
        ("mp4", "libx264", {"x264-params": "keyint=12:open-gop=1:bframes=3:scenecut=0"}),
    ],
)
def test_what_decord_gets_wrong_is_decoded_from_the_start(kind, codec, options, monkeypatch):
    monkeypatch.setattr(video_frames, "frames_by_decord", lambda *_: pytest.fail("decord was asked"))
    frames = read_frames(clip_bytes(60, kind=kind, codec=codec, **options), 5, **BOUNDS)
    assert _shades(frames) == pytest.approx([shade(i) for i in spread(60, 5)], abs=2)


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


def test_an_image_encoder_sees_frame_after_frame(tmp_path):
    folder, data = tiny.efficientnet_lite(tmp_path), clip_bytes(20)
    encoder, of_image = load_video_encoder(folder, VideoOptions(frames=3)), load_image_encoder(folder, ImageOptions())
    clip = encoder.decode(data)
    assert clip.shape == (3, 3, 64, 64)
    features = encoder(torch.stack([clip, clip.flip(0)]))
    assert features.shape == (2, 12, 1280)
    expected = of_image(clip)
    assert torch.allclose(features[0], expected.flatten(0, 1), atol=1e-5)
    assert torch.allclose(features[1], expected.flip(0).flatten(0, 1), atol=1e-5)
    pooled = load_video_encoder(folder, VideoOptions(frames=3, pool=1))
    assert torch.allclose(pooled(clip[None])[0], expected.mean(1), atol=1e-5)


def test_videomae_gets_its_own_number_of_frames(tmp_path):
    from transformers import VideoMAEModel

    folder = tiny.videomae(tmp_path)
    encoder = load_video_encoder(folder, VideoOptions())
    clip = encoder.decode(clip_bytes(20))[None]
    with torch.no_grad():
        expected = VideoMAEModel.from_pretrained(folder)(clip).last_hidden_state
    assert torch.allclose(encoder(clip), expected, atol=1e-6)
    pooled = load_video_encoder(folder, VideoOptions(pool=1))
    assert torch.allclose(pooled(clip), expected.unflatten(1, (2, 16)).mean(2), atol=1e-6)
    with pytest.raises(UserError, match="takes 4"):
        load_video_encoder(folder, VideoOptions(frames=8))
    with pytest.raises(UserError, match="square number"):
        VideoOptions(pool=3)
    with pytest.raises(UserError, match="pool is 25"):
        load_video_encoder(folder, VideoOptions(pool=25))


class _Clips(torch.utils.data.Dataset):
    def __init__(self, decode, data):
        self.decode, self.data = decode, data

    def __len__(self):
        return 4

    def __getitem__(self, _):
        return self.decode(self.data)


def test_clips_are_decoded_in_forked_workers(tmp_path):
    data = clip_bytes(20)
    decode = load_video_encoder(tiny.efficientnet_lite(tmp_path), VideoOptions(frames=2)).decode
    decode(data)  # in the parent first: what a reader leaves behind must not hang the children
    loader = torch.utils.data.DataLoader(_Clips(decode, data), 2, num_workers=2, timeout=60)
    assert [len(batch) for batch in loader] == [2, 2]


# --- audio ------------------------------------------------------------------------------------------------------------

CODECS = [("WAV", None), ("FLAC", None), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")]


@pytest.mark.parametrize(("kind", "subtype"), CODECS)
def test_sounds_of_every_format(kind, subtype):
    data = sound(1.0, 48000, 2, kind, subtype)
    samples, rate = read_sound(data, 10.0)
    assert (rate, samples.dtype) == (48000, torch.float32)
    assert abs(len(samples) - 48000) < 3000
    spectrum = torch.fft.rfft(samples[:48000]).abs()
    assert int(spectrum.argmax()) == 440 or abs(int(spectrum.argmax()) - 440) < 3


@pytest.mark.parametrize(("kind", "subtype"), CODECS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_cut_sounds_are_bad_samples(kind, subtype, share):
    data = sound(3.0, 48000, 2, kind, subtype)
    with pytest.raises(BadSample, match=r"cut off|do not decode"):
        read_sound(data[: int(share * len(data))], 10.0)


def test_bad_sounds_are_named():
    import soundfile

    def wav(samples, rate=16000, **kwargs):
        stream = io.BytesIO()
        soundfile.write(stream, samples, rate, format="WAV", **kwargs)
        return stream.getvalue()

    with pytest.raises(BadSample, match="NaN"):
        read_sound(wav(np.full(16000, np.nan, np.float32), subtype="FLOAT"), 10.0)
    with pytest.raises(BadSample, match=r"0 samples at 16000 Hz; wanted are at least 0.1 s"):
        read_sound(wav(np.zeros(0, np.float32)), 10.0)
    with pytest.raises(BadSample, match=r"a sound of 12 s; at most 10 s"):
        read_sound(sound(12.0, 1000), 10.0)
    with pytest.raises(BadSample, match="wanted are 1 to 16"):
        read_sound(sound(0.5, channels=17), 10.0)
    with pytest.raises(BadSample, match="in the format AIFF"):
        read_sound(sound(kind="AIFF"), 10.0)


def test_wavs_written_into_a_pipe_are_whole():
    data = bytearray(sound())
    data[4:8] = b"\xff\xff\xff\xff"
    assert len(read_sound(bytes(data), 10.0)[0]) == 16000


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 44101, 48000])
def test_any_rate_becomes_the_encoders(rate):
    time = torch.arange(rate) / rate
    wave = torch.sin(2 * torch.pi * 440 * time) + 0.5
    expected = torch.sin(2 * torch.pi * 440 * torch.arange(16000) / 16000) + 0.5
    resampled = resample(wave, rate, 16000)
    assert abs(len(resampled) - 16000) <= 1
    inner = slice(200, 15800)
    assert (resampled[inner] - expected[inner]).abs().max() < 0.02


def test_cropping_and_filling():
    signal = torch.arange(10.0)
    assert crop_centre(signal, 4).tolist() == [3, 4, 5, 6]
    assert crop_centre(signal, 20).tolist() == signal.tolist()
    assert hold_last(signal[None], 12)[0, -4:].tolist() == [8, 9, 9, 9]


def test_whisper_gives_what_transformers_gives(tmp_path):
    from transformers import WhisperFeatureExtractor, WhisperModel

    folder = tiny.whisper(tmp_path, seconds=2)
    encoder = load_audio_encoder(folder, AudioOptions())
    data = sound(1.3)
    samples, _ = read_sound(data, 10.0)
    made = WhisperFeatureExtractor.from_pretrained(folder)(samples.numpy(), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        expected = WhisperModel.from_pretrained(folder).encoder(made.input_features).last_hidden_state
    assert (encoder.tokens, encoder.width) == (100, 16)
    assert torch.allclose(encoder(encoder.decode(data)[None]), expected, atol=1e-5)
    assert not any("decoder" in name for name, _ in encoder.named_parameters())


def test_whisper_is_shortened_to_the_clip(tmp_path):
    folder = tiny.whisper(tmp_path, seconds=2)
    encoder = load_audio_encoder(folder, AudioOptions(seconds=0.5))
    assert encoder.tokens == 25
    assert encoder(encoder.decode(sound(1.0))[None]).shape == (1, 25, 16)
    with pytest.raises(UserError, match=r"seconds is 3; .* clips of 0.1 to 2 s"):
        load_audio_encoder(folder, AudioOptions(seconds=3))
    extractor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(extractor | {"chunk_length": 30}))
    with pytest.raises(UserError, match=r"max_source_positions is 100 in config.json, but chunk_length is 30 s"):
        load_audio_encoder(folder, AudioOptions())


@pytest.mark.parametrize("fusion", [False, True])
def test_long_sounds_are_cropped_the_same_way_each_time(tmp_path, fusion):
    encoder = load_audio_encoder(tiny.clap(tmp_path, fusion=fusion), AudioOptions())
    data = sound(3.0)
    first = encoder.decode(data)
    for seed in range(4):
        np.random.seed(seed)
        assert torch.equal(encoder.decode(data), first)


def test_clap_gives_what_transformers_gives_in_the_order_of_time(tmp_path):
    from transformers import ClapModel

    encoder = load_audio_encoder(tiny.clap(tmp_path), AudioOptions())
    spectrogram = encoder.decode(sound())[None]
    with torch.no_grad():
        maps = ClapModel.from_pretrained(tmp_path).audio_model(spectrogram).last_hidden_state
    features = encoder(spectrogram)
    rows = maps.shape[2]
    for time, row in ((0, 0), (1, 0), (1, rows - 1), (maps.shape[3] - 1, 0)):
        assert torch.allclose(features[0, time * rows + row], maps[0, :, row, time], atol=1e-5)


def test_ast_gives_its_patches_in_the_order_of_time(tmp_path):
    from transformers import ASTModel

    encoder = load_audio_encoder(tiny.ast(tmp_path), AudioOptions())
    spectrogram = encoder.decode(sound(0.5))[None]
    with torch.no_grad():
        states = ASTModel.from_pretrained(tmp_path)(spectrogram).last_hidden_state
    features = encoder(spectrogram)
    assert encoder.tokens == 4 * 12
    assert torch.allclose(features[0, 0], states[0, 2], atol=1e-5)
    assert torch.allclose(features[0, 1], states[0, 2 + 12], atol=1e-5), "the next row of frequency, the same time"
    assert torch.allclose(features[0, 4], states[0, 2 + 1], atol=1e-5), "the next time"


def test_an_image_encoder_is_no_audio_encoder(tmp_path):
    with pytest.raises(UserError, match="holds a dinov2; audio encoders can be: clap"):
        load_audio_encoder(tiny.dinov2(tmp_path), audio.AudioOptions())


# --- imu --------------------------------------------------------------------------------------------------------------


def test_channels_are_standardised(tmp_path):
    from adapters.imu_encoder import IMUEncoderConfig, IMUEncoderModel

    config = IMUEncoderConfig(seconds=1.0, hidden_size=16, mean=[0, 0, 9.81, 0, 0, 0], std=[2.0] * 6)
    IMUEncoderModel(config).save_pretrained(tmp_path)
    window = load_imu_encoder(str(tmp_path), IMUOptions(rate=50)).decode(npy(motion(50)))
    expected = (torch.from_numpy(motion(50)).T - torch.tensor([0, 0, 9.81, 0, 0, 0])[:, None]) / 2
    assert torch.allclose(window, expected, atol=1e-5)


def test_recordings_are_resampled_cropped_and_held(tmp_path):
    folder = tiny.imu(tmp_path)
    decode = load_imu_encoder(folder, IMUOptions(rate=50)).decode
    recording = motion(200)
    assert torch.equal(decode(npy(recording)), decode(npy(recording[75:125]))), "the middle of a longer one"
    short = decode(npy(recording[:30]))
    assert torch.equal(short[:, 30:], short[:, 29:30].expand(-1, 20)), "the last value of a shorter one is held"
    with pytest.raises(BadSample, match=r"24 samples, 0.48 s at 50 Hz; wanted is a window of 1 s, or at least half"):
        decode(npy(recording[:24]))
    time = np.arange(200)[:, None] / 200
    fast = (np.sin(2 * np.pi * 2 * time) + np.array([[0, 0, 9.81, 0, 0, 0]])).astype("float32")
    slow = decode(npy(fast[::4]))
    assert (load_imu_encoder(folder, IMUOptions(rate=200)).decode(npy(fast)) - slow)[:, 5:45].abs().max() < 0.02


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_any_float_is_taken(dtype):
    recording = read_recording(npy(motion().astype(dtype)), 1000)
    assert (recording.dtype, recording.shape) == (np.float32, (50, 6))


def test_bad_recordings_are_named():
    def refused(data, match, most=1000):
        with pytest.raises(BadSample, match=match):
            read_recording(data, most)

    refused(npy(motion().T.copy()), r"\[6, 50\] of float32; wanted is .*; transpose it")
    refused(npy(motion()[:, :3].copy()), r"\[50, 3\] of float32; wanted is a float array \[samples, 6\]")
    refused(npy(motion().astype("int16")), "of int16; wanted is a float array")
    refused(npy(np.zeros((0, 6), "float32")), "0 samples; wanted are 1 to 1000")
    refused(npy(motion(50)), "50 samples; wanted are 1 to 40", most=40)
    broken = motion()
    broken[3, 2] = np.nan
    refused(npy(broken), "1 of 300 values are NaN or infinite")
    degrees = motion()
    degrees[:, 3:] *= 180
    refused(npy(degrees), "degrees per second")
    refused(npy(motion())[:-8], "it is cut off")
    huge = npy(motion()).replace(b"(50, 6), }          ", b"(500000000000, 6), }")
    refused(huge, "500000000000 samples; wanted are 1 to 1000")


def test_fortran_order_is_understood():
    assert np.array_equal(read_recording(npy(np.asfortranarray(motion())), 1000), motion())


def test_the_rate_must_be_stated(tmp_path):
    with pytest.raises(UserError, match=r"imu.options.rate must state .* takes 50 Hz"):
        load_imu_encoder(tiny.imu(tmp_path), IMUOptions())


def test_an_image_encoder_is_no_imu_encoder(tmp_path):
    with pytest.raises(UserError, match="holds a dinov2, not an IMU encoder"):
        load_imu_encoder(tiny.dinov2(tmp_path), imu.IMUOptions(rate=50))


def _imu_shard(path, count, seed):
    """Two kinds of motion that can be told apart, one sample without a label, one that is a pickle."""
    import webdataset as wds

    rng = np.random.default_rng(seed)
    with wds.TarWriter(str(path), encoder=False) as writer:
        for i in range(count):
            time = np.arange(50)[:, None] / 50 + rng.random()
            wave = np.sin(2 * np.pi * (1 + 3 * (i % 2)) * time) * np.ones((1, 6))
            data = npy((wave + 0.1 * rng.standard_normal((50, 6))).astype("float32"))
            label = json.dumps({"label": ("slow", "fast")[i % 2]}).encode()
            writer.write({"__key__": f"{i:04d}", "imu.npy": data, "json": label})
        writer.write({"__key__": "nameless", "imu.npy": npy(motion()), "json": b"{}"})
        pickled = npy(np.array([{}], dtype=object), allow_pickle=True)
        writer.write({"__key__": "pickled", "imu.npy": pickled, "json": b'{"label": "slow"}'})


def test_imu_encoder_is_trained_and_loads(tmp_path, capsys):
    from launch.pretrain_imu_encoder import IMUTraining, main, run

    _imu_shard(tmp_path / "train.tar", 64, 0)
    _imu_shard(tmp_path / "test.tar", 32, 1)
    out = tmp_path / "models" / "imu"
    settings = IMUTraining(
        shards=str(tmp_path / "train.tar"),
        eval_shards=str(tmp_path / "test.tar"),
        out=str(out),
        seconds=1.0,
        width=16,
        blocks=1,
        steps=40,
        batch_size=16,
        lr=1e-2,
    )
    assert run(settings) > 0.9
    assert "skipped 2 bad samples of 66" in capsys.readouterr().out
    assert "with their labels** (fast, slow)" in (out / "README.md").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert [path.name for path in out.parent.iterdir()] == ["imu"], "nothing temporary is left"
    encoder = load_imu_encoder(str(out), IMUOptions(rate=50))
    window = encoder.decode(npy(motion()))
    assert encoder(window[None]).shape == (1, 7, 16)
    before = (out / "model.safetensors").read_bytes()
    main([f"shards={tmp_path / 'train.tar'}", f"out={out}"])
    assert "is there already" in capsys.readouterr().out
    assert (out / "model.safetensors").read_bytes() == before


def test_imu_training_refuses_what_it_cannot_learn_from(tmp_path):
    from launch.pretrain_imu_encoder import IMUTraining, run

    with pytest.raises(UserError, match="there is no shard"):
        run(IMUTraining(shards=str(tmp_path / "none.tar"), out=str(tmp_path / "out")))
    _imu_shard(tmp_path / "train.tar", 1, 0)
    with pytest.raises(UserError):
        run(IMUTraining(shards=str(tmp_path / "train.tar"), out=str(tmp_path / "out"), seconds=1.0))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="width a multiple of 16"):
        IMUTraining(shards="x", out="y", width=100)


def test_registry_entries_are_the_modules_own():
    assert [m.MODALITY.name for m in (image, video, audio, imu)] == ["image", "video", "audio", "imu"]
