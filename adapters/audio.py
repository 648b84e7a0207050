"""Audio: a sound file's bytes → what the encoder's feature extractor makes of it → features of a frozen encoder.

CLAP's audio tower, AST, and Whisper's encoder through transformers, each with its own feature extractor. soundfile
decodes wav, flac, ogg, opus and mp3; torchaudio resamples to the encoder's rate.

    N clips   tokens features of a clip   width channels of a feature
"""

import io
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from anymal.adapters.pretrained import call, load_config, load_network, save_network
from anymal.adapters.signals import crop_centre, noted, resample
from anymal.errors import BadSample, UserError
from anymal.modality import Encoder, Modality
from anymal.model.hub import license_of
from anymal.sample import Noted

if TYPE_CHECKING:
    from soundfile import SoundFile
    from transformers import ASTFeatureExtractor, ClapFeatureExtractor, PreTrainedModel, WhisperFeatureExtractor
    from transformers.models.clap.modeling_clap import ClapAudioModel
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

FAMILIES = {"clap": "audio_model", "audio-spectrogram-transformer": "", "whisper": "encoder"}
"""transformers' model types that are understood, and the part of the model that encodes audio (the whole, if empty)."""
FORMATS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3")
"""soundfile's names of what is decoded; of the many others that it knows, none is in use on the web."""
MIN_SECONDS = 0.1
"""A shorter sound is a bad sample: it has no more than a few frames of a spectrogram."""
MAX_CHANNELS = 16
MAX_SAMPLES = 1 << 26
"""Of a sound, once its channels are one: 256 MB. Ten minutes at 96 kHz have fewer."""
MAX_VALUES = 1 << 28
"""Samples times channels that are decoded: a FLAC of silence holds a thousand of them in a byte."""
RATES = (1000, 400_000)
_BLOCK = 1 << 22  # samples times channels
WHISPER_POSITIONS = 50
"""Features of Whisper for one second: frames of 10 ms, halved by a convolution."""


@dataclass(kw_only=True)
class AudioOptions:
    """How sounds are decoded and encoded."""

    seconds: float = 0.0
    """Length of a clip: a longer sound is cropped to its middle. 0 takes the encoder's own (Whisper 30, CLAP and AST
    10 s), which is also the most. Shorter clips are filled up by the encoder's feature extractor, as it was trained
    (Whisper and AST with silence, CLAP by repeating). Whisper's encoder is shortened to it, so it gives 50 features a
    second; the others give as many for any length."""
    max_seconds: float = 600.0
    """A longer sound is a bad sample. Judged by its header, before it is decoded."""


def read_sound(data: bytes, max_seconds: float) -> tuple[Tensor, int]:
    """Decode a sound file.

    Returns:
        [samples] float32, the mean of its channels, and its rate in Hz.

    Raises:
        BadSample: Not a sound file, cut off (as far as its headers tell), empty, not finite, or beyond the bounds.
    """
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            frames, rate, channels = file.frames, file.samplerate, file.channels
            if file.format not in FORMATS:
                raise BadSample(f"a sound in the format {file.format}; wanted is wav, flac, ogg, opus or mp3")
            if not RATES[0] <= rate <= RATES[1] or channels > MAX_CHANNELS:
                raise BadSample(
                    f"{channels} channels at {rate} Hz; wanted are 1 to {MAX_CHANNELS} at {RATES[0]} to {RATES[1]} Hz"
                )
            if frames > max_seconds * rate:
                raise BadSample(f"a sound of {frames / rate:.0f} s; at most {max_seconds:g} s are wanted (max_seconds)")
            if frames > MAX_SAMPLES or frames * channels > MAX_VALUES:
                raise BadSample(
                    f"a sound of {frames} samples in {channels} channels; at most {MAX_SAMPLES}, or {MAX_VALUES} in "
                    "all channels, are decoded"
                )
            sound = _mono(file)
    except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError) as error:
        raise BadSample(
            f"{len(data)} bytes that begin with {data[:12]!r} do not decode as wav, flac, ogg, opus or mp3: "
            f"{getattr(error, 'error_string', error)}"
        ) from error
    cut = _cut_off(data)
    if cut or len(sound) < 0.95 * frames:  # an mp3's length may be an estimate
        raise BadSample(f"the sound is cut off: {cut or f'{len(sound)} of {frames} samples are there'}")
    if len(sound) < MIN_SECONDS * rate:
        raise BadSample(f"a sound of {len(sound)} samples at {rate} Hz; wanted are at least {MIN_SECONDS} s")
    if not torch.isfinite(sound).all():
        raise BadSample("the sound holds NaN or infinite samples")
    return sound, rate


def _mono(file: "SoundFile") -> Tensor:
    """An open file → [samples], the mean of its channels; read a block at a time."""
    sound, read = torch.empty(file.frames), 0
    while read < file.frames:
        block = file.read(min(_BLOCK // file.channels, file.frames - read), dtype="float32", always_2d=True)
        if not len(block):
            break
        sound[read : read + len(block)] = torch.from_numpy(block).mean(1)
        read += len(block)
    return sound[:read]


def _cut_off(data: bytes) -> str:
    """Why a wav or Ogg file is cut off, or an empty string. libsndfile reads what is left of these without an error."""
    if data[:4] == b"RIFF":
        promised = struct.unpack_from("<I", data, 4)[0] + 8
        # a program that writes into a pipe cannot go back to put the size in, and leaves all ones or zero
        if len(data) < promised < 0xFFFFFFFF:
            return f"{len(data)} of {promised} bytes are there"
    if data[:4] == b"OggS":
        page = data.rfind(b"OggS")
        lacing = data[page + 27 : page + 27 + data[page + 26]] if page + 27 <= len(data) else b""
        if page + 27 > len(data) or len(lacing) < data[page + 26] or page + 27 + len(lacing) + sum(lacing) > len(data):
            return "its last page is not whole"
        if not data[page + 5] & 4:
            return "its last page is not marked as the last"
    return ""


@dataclass(frozen=True, kw_only=True)
class AudioDecoder:
    """bytes → the feature extractor's spectrogram of one clip, float32; with a note if the sound is longer."""

    extractor: "ASTFeatureExtractor | ClapFeatureExtractor | WhisperFeatureExtractor"
    """The encoder's feature extractor."""
    field: str
    """Which of its outputs the encoder takes."""
    seconds: float
    """Length of a clip."""
    max_seconds: float
    """As in `AudioOptions`."""

    def __call__(self, data: bytes) -> Tensor | Noted:
        """Raises `BadSample`."""
        sound, rate = read_sound(data, self.max_seconds)
        # cropped here, since CLAP's extractor crops at random places, drawn from global state
        clip = crop_centre(resample(sound, rate, self.extractor.sampling_rate), self.samples)
        return noted(self.prepare(clip), seconds=len(sound) / rate, clip=self.seconds)

    @property
    def samples(self) -> int:
        """Samples of a clip at the encoder's rate."""
        return int(self.seconds * self.extractor.sampling_rate)

    def prepare(self, clip: Tensor) -> Tensor:
        """[samples] float32 at the encoder's rate → its spectrogram."""
        outputs = self.extractor(clip.numpy(), sampling_rate=self.extractor.sampling_rate, return_tensors="pt")
        return outputs[self.field][0].float()


class AudioEncoder(Encoder):
    """A frozen audio network. Its features come in the order of time.

    Args:
        network: CLAP's or Whisper's audio encoder, or AST.
        family: A key of `FAMILIES`.
        decode: Its decoding.
        license: The weights' licence.
    """

    decode: AudioDecoder
    savable = True

    def __init__(self, network: "PreTrainedModel", family: str, decode: AudioDecoder, license: str):
        super().__init__()
        self.network, self.family, self.decode, self.license = network, family, decode, license
        self.eval()
        with torch.no_grad():
            silence = decode.prepare(torch.zeros(decode.samples))[None]
            _, self.tokens, self.width = self(silence).shape
        self.shape = tuple(silence.shape[1:])

    def forward(self, spectrograms: Tensor) -> Tensor:
        """[N, ...] spectrograms → [N, tokens, width]."""
        if self.family == "clap":
            whole = spectrograms[:, :1]  # further channels are crops, for the fusion that `_unfuse` took away
            features = self.network(whole).last_hidden_state  # [N, width, frequency, time]
            return features.permute(0, 3, 2, 1).flatten(1, 2)
        features = self.network(spectrograms).last_hidden_state
        if self.family == "whisper":
            return features
        # AST: two class tokens, then patches row by row of frequency; time first here, so that pooling averages in time
        config = self.network.config
        rows = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
        return features[:, 2:].unflatten(1, (rows, -1)).transpose(1, 2).flatten(1, 2)

    def save_pretrained(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write a folder that the loader of this modality reads; `weights` are a whole state dict of this encoder."""
        save_network(self.network, self.decode.extractor, folder, weights, self.license)


def load_audio_encoder(name: str, options: AudioOptions) -> AudioEncoder:
    """An audio encoder by hub name or local folder, frozen, in fp32 on the CPU, with its own preprocessing.

    Raises:
        UserError: It cannot be loaded, is of another family, or `options.seconds` is more than it takes.
    """
    family = load_config(name).model_type
    if family not in FAMILIES:
        raise UserError(f"{name!r} holds a {family}; audio encoders can be: {', '.join(FAMILIES)}")
    network = load_network(name, tower=FAMILIES[family] or None)
    from transformers import AutoFeatureExtractor
    from transformers.models.clap.modeling_clap import ClapAudioModel
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    extractor = call("feature extractor", name, AutoFeatureExtractor.from_pretrained, trust_remote_code=False)
    own = _own_seconds(extractor)
    seconds = options.seconds or own
    if not MIN_SECONDS <= seconds <= own:
        raise UserError(f"seconds is {seconds:g}; {name!r} takes clips of {MIN_SECONDS} to {own:g} s")
    if isinstance(network, WhisperEncoder):
        _shorten_whisper(network, extractor, name, seconds)
    if isinstance(network, ClapAudioModel):
        _unfuse(network)
    decode = AudioDecoder(
        extractor=extractor,
        field=extractor.model_input_names[0],
        seconds=seconds,
        max_seconds=options.max_seconds,
    )
    return AudioEncoder(network, family, decode, license_of(name))


def _own_seconds(extractor: "ASTFeatureExtractor | ClapFeatureExtractor | WhisperFeatureExtractor") -> float:
    from transformers import ClapFeatureExtractor, WhisperFeatureExtractor

    if isinstance(extractor, ClapFeatureExtractor):
        return extractor.max_length_s
    if isinstance(extractor, WhisperFeatureExtractor):
        return extractor.chunk_length
    return extractor.max_length / 100  # AST: frames of 10 ms


def _unfuse(network: "ClapAudioModel") -> None:
    """Switch off CLAP's fusion of a long sound with crops of it (channels 1 to 3 of its spectrograms).

    Decoding has cropped the sound already. CLAP then treats every sound as one that is not "longer", and does not look
    at each sample to know.
    """
    network.audio_encoder.enable_fusion = network.audio_encoder.patch_embed.enable_fusion = False


def _shorten_whisper(
    network: "WhisperEncoder", extractor: "WhisperFeatureExtractor", name: str, seconds: float
) -> None:
    """Let Whisper take clips of `seconds`, in whole positions: the start of its table of them is kept."""
    own, positions = network.config.max_source_positions, math.ceil(seconds * WHISPER_POSITIONS - 1e-6)
    if own != round(extractor.chunk_length * WHISPER_POSITIONS):  # for 1.1 s the product is 55.00000000000001
        raise UserError(
            f"{name!r}: max_source_positions is {own} in config.json, but chunk_length is {extractor.chunk_length} s "
            f"in preprocessor_config.json; {WHISPER_POSITIONS} positions a second are wanted"
        )
    extractor.n_samples = positions * extractor.sampling_rate // WHISPER_POSITIONS
    extractor.nb_max_frames = extractor.n_samples // extractor.hop_length
    if positions == own:
        return
    weight = network.embed_positions.weight[:positions]
    network.embed_positions = nn.Embedding.from_pretrained(weight.clone(), freeze=True)
    network.config.max_source_positions = network.max_source_positions = positions
    extractor.chunk_length = positions / WHISPER_POSITIONS  # not `seconds`: what is saved must fit the table


MODALITY = Modality(
    name="audio", suffixes=("flac", "opus", "wav", "mp3", "ogg"), options=AudioOptions, load=load_audio_encoder
)
