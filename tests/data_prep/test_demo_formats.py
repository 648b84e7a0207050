"""Data preparation: the file formats of the demo's models and recordings, on tiny files that the tests write."""

import io
import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel

import anymal  # noqa: F401  (makes torchaudio importable before transformers)
from anymal.data_prep.demo import ctranslate2_whisper, gguf_llm, smartwatch
from anymal.data_prep.demo.soundfont import RATE, Soundfont
from anymal.errors import UserError

# GGUF → LLM

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "Ġc", "Ġca", "Ġcat"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny random Llama, the GGUF file that llama.cpp's conversion would make of it, and the converted folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("gguf")
    _write_gguf(model, folder / "model.gguf")
    gguf_llm.convert(folder / "model.gguf", folder / "llm", "---\nlicense: mit\n---\n")
    return model, folder


def _write_gguf(model, path: Path, tokenizer: str = "smollm") -> None:
    from gguf import GGUFWriter, TokenType

    config, writer = model.config, GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer)
    writer.add_token_list(WORDS)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(WORDS) - 3))
    writer.add_token_merges(["Ġ c", "Ġc a", "Ġca t"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    names = {v: k for k, v in gguf_llm._LAYER_NAMES.items()} | {v: k for k, v in gguf_llm._TOP_NAMES.items()}
    for name, tensor in model.state_dict().items():
        base, _, kind = name.rpartition(".")
        if name == "lm_head.weight":
            continue
        values, prefix = tensor.numpy(), ""
        if base.startswith("model.layers."):
            layer, _, base = base.removeprefix("model.layers.").partition(".")
            prefix = f"blk.{layer}."
        heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(base)
        if heads:  # rotary pairs side by side, as llama.cpp stores them
            values = values.reshape(heads, 2, values.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"{prefix}{names[base]}.{kind}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_gives_the_same_model(llama):
    from transformers import AutoModelForCausalLM

    model, folder = llama
    loaded = AutoModelForCausalLM.from_pretrained(folder / "llm")
    ids = torch.randint(0, 259, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.dtype == torch.float32 and loaded.config.eos_token_id == 2 and loaded.config.pad_token_id == 2


def test_gguf_tokenizer_splits_and_joins(llama):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama[1] / "llm")
    text = "a cat: 12 été\n<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and ids[-1] == 2
    assert tokenizer.convert_ids_to_tokens(tokenizer(" cat")["input_ids"]) == ["Ġcat"]
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert asked == "<|im_start|>hi<|im_end|>"


def test_gguf_of_another_tokenizer_is_refused(llama, tmp_path):
    _write_gguf(llama[0], tmp_path / "other.gguf", tokenizer="falcon")
    with pytest.raises(UserError, match="falcon"):
        gguf_llm.convert(tmp_path / "other.gguf", tmp_path / "llm", "")
    assert not (tmp_path / "llm").exists()


# CTranslate2 → Whisper


def _model_bin(arrays: dict[str, np.ndarray], specification: str = "WhisperSpec", version: int = 6) -> bytes:
    def name(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    kinds = {np.dtype(kind): number for number, kind in enumerate(ctranslate2_whisper._DTYPES)}
    data = struct.pack("<I", version) + name(specification) + struct.pack("<II", 3, len(arrays))
    for key, array in arrays.items():
        data += name(key) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        data += struct.pack("<BI", kinds[array.dtype], array.nbytes) + array.tobytes()
    return data + struct.pack("<I", 0)


def _ctranslate2(model) -> dict[str, np.ndarray]:
    """The arrays that CTranslate2 would store for a Whisper of transformers."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    arrays = {f"{side}/num_heads": np.array(2, np.int16) for side in ("encoder", "decoder")}
    kinds = {"weight": "weight", "bias": "bias"}
    for side, layers in (("encoder", 2), ("decoder", 1)):
        for part, places in ctranslate2_whisper._LAYER_NAMES.items():
            for layer in range(layers):
                prefix = f"{side}.layers.{layer}"
                if f"{prefix}.{places[0]}.weight" not in state:
                    continue  # encoders have no cross-attention
                for kind, theirs in {"weight": "gamma", "bias": "beta"}.items() if "norm" in part else kinds.items():
                    width = state[f"{prefix}.{places[0]}.weight"].shape[0]
                    pieces = [state.get(f"{prefix}.{p}.{kind}", np.zeros(width, np.float32)) for p in places]
                    arrays[f"{side}/layer_{layer}/{part}/{theirs}"] = np.concatenate(pieces)
        arrays[f"{side}/layer_norm/gamma"] = state[f"{side}.layer_norm.weight"]
        arrays[f"{side}/layer_norm/beta"] = state[f"{side}.layer_norm.bias"]
        arrays[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
    arrays["decoder/embeddings/weight"] = state["decoder.embed_tokens.weight"]
    for conv in ("conv1", "conv2"):
        for kind in kinds:
            arrays[f"encoder/{conv}/{kind}"] = state[f"encoder.{conv}.{kind}"]
    return arrays


@pytest.fixture(scope="module")
def whisper():
    """A tiny random Whisper and the arrays of its model.bin."""
    from transformers import WhisperConfig, WhisperModel

    torch.manual_seed(0)
    sizes = {"encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = WhisperConfig(
        vocab_size=51864,  # as tiny.en has it: the special tokens' ids are Whisper's own
        num_mel_bins=8,
        d_model=16,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=1500,
        max_target_positions=12,
        init_std=0.2,
        **sizes,
    )
    model = WhisperModel(config).eval()
    return model, _ctranslate2(model)


def test_whisper_comes_back_whole(whisper, tmp_path):
    from transformers import AutoFeatureExtractor, AutoModel

    model, arrays = whisper
    ctranslate2_whisper.convert(_model_bin(arrays), tmp_path / "audio", "---\nlicense: mit\n---\n", seconds=2)
    loaded, report = AutoModel.from_pretrained(tmp_path / "audio", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    expected = model.state_dict() | {"encoder.embed_positions.weight": model.encoder.embed_positions.weight[:100]}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "audio")
    spectrogram = extractor(np.ones(9000), sampling_rate=16000, return_tensors="pt").input_features
    assert spectrogram.shape == (1, 8, 200)
    assert loaded.encoder(spectrogram).last_hidden_state.shape == (1, 100, 16)


def test_whisper_files_that_are_not_understood_are_refused(whisper, tmp_path):
    arrays = whisper[1]
    good = _model_bin(arrays)
    for data, reason in (
        (good[:-200], "damaged"),
        (_model_bin(arrays, version=5), "version 5"),
        (_model_bin(arrays, specification="TransformerSpec"), "TransformerSpec"),
        (_model_bin(arrays | {"encoder/layer_0/new/weight": np.zeros(3, np.float32)}), "has no place"),
        (_model_bin({n: a + 1 if n.endswith("linear_0/bias") else a for n, a in arrays.items()}), "keys have no bias"),
    ):
        with pytest.raises(UserError, match=reason):
            ctranslate2_whisper.convert(data, tmp_path / "audio", "", seconds=2)
    with pytest.raises(UserError, match="seconds is 31"):
        ctranslate2_whisper.convert(good, tmp_path / "audio", "", seconds=31)
    assert not (tmp_path / "audio").exists()


# SoundFont


def _chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def make_soundfont() -> bytes:
    """One looped recording of A4 (440 Hz), played by preset 5 for keys 40 to 90; it falls by 100 dB a second."""
    rate, samples = 22050, 2205  # whole periods, so the loop is seamless
    wave = (20000 * np.sin(2 * np.pi * 440 * np.arange(samples) / rate)).astype("<i2")
    pcm = np.concatenate([wave, np.zeros(46, "<i2")])
    generators = [(43, 40 | 90 << 8), (54, 1), (36, 0), (37, 1000), (58, 69), (53, 0)]
    header = struct.pack("<20s5IBbHH", b"A4", 0, samples, 0, samples - 5, rate, 60, 0, 0, 1)
    lists = {
        b"phdr": struct.pack("<20s3H3I", b"Beep", 5, 0, 0, 0, 0, 0) + struct.pack("<20s3H3I", b"EOP", 0, 0, 1, 0, 0, 0),
        b"pbag": struct.pack("<4H", 0, 0, 1, 0),
        b"pgen": struct.pack("<HhHh", 41, 0, 0, 0),
        b"inst": struct.pack("<20sH20sH", b"Beep", 0, b"EOI", 1),
        b"ibag": struct.pack("<4H", 0, 0, len(generators), 0),
        b"igen": b"".join(struct.pack("<Hh", *pair) for pair in generators) + bytes(4),
        b"shdr": header + struct.pack("<20s5IBbHH", b"EOS", *[0] * 9),
    }
    pdta = _chunk(b"LIST", b"pdta" + b"".join(_chunk(name, body) for name, body in lists.items()))
    sdta = _chunk(b"LIST", b"sdta" + _chunk(b"smpl", pcm.tobytes()))
    return _chunk(b"RIFF", b"sfbk" + sdta + pdta)


@pytest.mark.parametrize(("key", "hertz"), [(69, 440), (81, 880), (57, 220)])
def test_notes_have_their_pitch_and_length(key, hertz):
    font = Soundfont(make_soundfont())
    assert font.names == {(0, 5): "Beep"} and font.recordings(0, 5) == {0}
    sound = font.play(0, 5, [(0.25, 0.5, key, 100)], 1.5)
    assert sound.shape == (RATE * 3 // 2,) and sound.dtype == np.float32 and np.abs(sound).max() == pytest.approx(0.7)
    spectrum = np.abs(np.fft.rfft(sound))
    assert np.argmax(spectrum) / 1.5 == pytest.approx(hertz, abs=3)
    parts = [(0, 0.2), (0.26, 0.4), (0.6, 0.75), (1, 1.5)]
    loudness = [np.abs(sound[round(begin * RATE) : round(end * RATE)]).max() for begin, end in parts]
    assert loudness[0] < 0.01 and loudness[3] < 0.01 < loudness[2] < loudness[1] / 5
    assert np.array_equal(sound, font.play(0, 5, [(0.25, 0.5, key, 100)], 1.5))


def test_soundfonts_say_what_is_wrong():
    with pytest.raises(UserError, match="has no recording for the keys"):
        Soundfont(make_soundfont()).play(0, 5, [(0, 1, 100, 100)], 1)
    assert Soundfont(make_soundfont()).recordings(0, 5, range(91, 100)) == set()
    with pytest.raises(UserError, match="not a SoundFont"):
        Soundfont(b"RIFF....WAVEfmt ")
    with pytest.raises(UserError, match="damaged"):
        Soundfont(make_soundfont()[:-200])


# The watch's pickle


def _object_npy(value: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(value, dtype=object), allow_pickle=True)
    return buffer.getvalue()


def test_arrays_are_unpickled():
    found = smartwatch.unpickle_arrays(_object_npy({"X": [np.eye(3)], "y": np.arange(4), "labels": ["a"]})).item()
    assert np.array_equal(found["X"][0], np.eye(3)) and found["labels"] == ["a"]


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/anymal-was-here",)


def test_nothing_else_is_unpickled():
    with pytest.raises(UserError, match="mkdir"):
        smartwatch.unpickle_arrays(_object_npy({"X": _Evil()}))
    with pytest.raises(UserError, match="eval"):
        smartwatch.unpickle_arrays(_object_npy({})[:128] + pickle.dumps(eval))
    assert not Path("/tmp/anymal-was-here").exists()


def test_model_folders_state_their_licence(llama):
    card = (llama[1] / "llm" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---")
    assert json.loads((llama[1] / "llm" / "config.json").read_text())["tie_word_embeddings"] is True
