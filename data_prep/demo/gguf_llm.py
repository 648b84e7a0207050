"""A GGUF file of the Llama family → a folder that transformers' ``from_pretrained`` loads, in fp32, with its tokenizer.

    python data_prep/demo/gguf_llm.py gguf=SmolLM2-135M-Instruct.Q4_1.gguf folder=models/smollm2 license=apache-2.0

transformers reads GGUF too, but takes ten times as long and will not save what it read. GGUF stores the quantised
values of a checkpoint that was trained in 16 bits; they are dequantised here once and quantised anew, to whatever
``model.llm.bits`` says, when the folder is loaded. The file's licence is copied to the folder's model card.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import MISSING

from anymal.config.command_line import parse_args, run_program
from anymal.errors import UserError
from anymal.files import is_done, whole_folder

if TYPE_CHECKING:
    from gguf import GGUFReader

_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


@dataclass(kw_only=True)
class Settings:
    """Settings of this step."""

    gguf: str = MISSING
    """The GGUF file: Llama architecture, byte-level BPE tokenizer."""
    folder: str = MISSING
    """The folder to write."""
    source: str = ""
    """Where the file comes from, for the model card; empty takes its name."""
    license: str = "unknown"
    """Its licence, for the model card."""


def convert(gguf: Path, folder: Path, card: str) -> None:
    """Write `folder`: weights, configuration, tokenizer with chat template, and `card` as its README.

    Raises:
        UserError: Another architecture or tokenizer than those that are understood, or a tensor without a place.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError("reading GGUF needs the package gguf: pip install -e '.[demo]'") from error

    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kinds = fields["general.architecture"], fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre")
    if kinds != ("llama", "gpt2", "smollm"):
        raise UserError(f"{gguf}: architecture and tokenizer are {kinds}; understood are ('llama', 'gpt2', 'smollm')")
    with whole_folder(folder) as temporary:
        _save_weights(reader, fields, temporary)
        _save_config(fields, {tensor.name for tensor in reader.tensors}, temporary)
        _save_tokenizer(fields, temporary)
        (temporary / "README.md").write_text(card)


def _save_weights(reader: "GGUFReader", fields: dict[str, Any], folder: Path) -> None:
    from gguf import dequantize
    from safetensors.numpy import save_file

    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    tensors = {}
    for tensor in reader.tensors:
        base, _, kind = tensor.name.rpartition(".")
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if base in _TOP_NAMES:
            tensors[f"{_TOP_NAMES[base]}.{kind}"] = values
            continue
        _, _, layer_and_part = base.partition("blk.")
        layer, _, part = layer_and_part.partition(".")
        if part not in _LAYER_NAMES:
            raise UserError(f"tensor {tensor.name} has no place in transformers' Llama")
        if part in heads:
            values = _rotate_halves(values, heads[part])
        tensors[f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"] = np.ascontiguousarray(values)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _rotate_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """[heads * 2 * half, width], rotary pairs side by side as llama.cpp wants them → first halves, then second."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _save_config(fields: dict[str, Any], tensor_names: set[str], folder: Path) -> None:
    ids = {f"{name}_token_id": fields[f"tokenizer.ggml.{key}_token_id"] for name, key in _SPECIAL_TOKENS.items()}
    ids.pop("unk_token_id")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": float(np.format_float_positional(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_parameters": {"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        "tie_word_embeddings": "output.weight" not in tensor_names,
        **ids,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2))


def _save_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """Byte-level BPE that splits digits, as SmolLM2's own tokenizer does (pre-tokenizer "smollm")."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    control = [word for word, kind in zip(words, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {name: fields[f"tokenizer.ggml.{key}_token_id"] for name, key in _SPECIAL_TOKENS.items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
        **{f"{name}_token": words[number] for name, number in ids.items()},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def main(argv: list[str] | None = None) -> None:
    """The program."""
    settings = parse_args(Settings, __doc__, argv)
    folder = Path(settings.folder)
    if not is_done(folder):
        source = settings.source or Path(settings.gguf).name
        convert(Path(settings.gguf), folder, f"---\nlicense: {settings.license}\n---\nConverted from {source}.\n")


def start() -> None:
    """Run the program, for the command line."""
    run_program(main)


if __name__ == "__main__":
    start()
