"""Audio: sounds of every format, bad ones are refused, features are those of transformers in the order of time."""

import io
import json

import numpy as np
import pytest
import torch

import tiny_encoders as tiny
from anymal.adapters.audio import AudioOptions, load_audio_encoder, read_sound
from anymal.errors import BadSample, UserError
from tiny_encoders import sound

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
    assert encoder(tiny.decoded(encoder.decode, sound(1.0))[None]).shape == (1, 25, 16)
    with pytest.raises(UserError, match=r"seconds is 3; .* clips of 0.1 to 2 s"):
        load_audio_encoder(folder, AudioOptions(seconds=3))
    extractor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(extractor | {"chunk_length": 30}))
    with pytest.raises(UserError, match=r"max_source_positions is 100 in config.json, but chunk_length is 30 s"):
        load_audio_encoder(folder, AudioOptions())


@pytest.mark.parametrize("seconds", [0.31, 0.55, 0.56, 0.57])  # of positions no whole numbers, or not as floats
def test_a_shortened_whisper_can_be_saved_and_loaded(tmp_path, seconds):
    first = load_audio_encoder(tiny.whisper(tmp_path / "whole"), AudioOptions(seconds=seconds))
    first.save_pretrained(tmp_path / "saved", first.state_dict())
    again = load_audio_encoder(str(tmp_path / "saved"), AudioOptions(seconds=seconds))
    spectrogram = tiny.decoded(first.decode, sound())
    assert torch.equal(tiny.decoded(again.decode, sound()), spectrogram)
    assert torch.equal(again(spectrogram[None]), first(spectrogram[None]))


@pytest.mark.parametrize("fusion", [False, True])
def test_long_sounds_are_cropped_the_same_way_each_time(tmp_path, fusion):
    encoder = load_audio_encoder(tiny.clap(tmp_path, fusion=fusion), AudioOptions())
    data = sound(3.0)
    first = encoder.decode(data)
    assert first.note == f"cropped to the middle {encoder.decode.seconds:g} s"
    for seed in range(4):
        np.random.seed(seed)
        assert torch.equal(encoder.decode(data).tensor, first.tensor)


def test_only_a_longer_sound_has_a_note(tmp_path):
    decode = load_audio_encoder(tiny.whisper(tmp_path, seconds=2), AudioOptions()).decode
    for seconds in (0.5, 1.99, 2.0, 2.01):  # rounding, and what codecs put around a sound, is no loss
        assert torch.is_tensor(decode(sound(seconds))), seconds
    assert torch.is_tensor(decode(sound(2.0, rate=44100))), "resampling may give one sample more"
    assert decode(sound(2.1)).note == "cropped to the middle 2 s"


@pytest.mark.parametrize("fusion", [False, True])
def test_clap_gives_what_transformers_gives_in_the_order_of_time(tmp_path, fusion):
    from transformers import ClapModel

    encoder = load_audio_encoder(tiny.clap(tmp_path, fusion=fusion), AudioOptions())
    spectrogram = encoder.decode(sound())[None]
    shorter = torch.tensor([[False]])  # than the clip, as decoding leaves it
    with torch.no_grad():
        maps = ClapModel.from_pretrained(tmp_path).audio_model(spectrogram, is_longer=shorter).last_hidden_state
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
        load_audio_encoder(tiny.dinov2(tmp_path), AudioOptions())
