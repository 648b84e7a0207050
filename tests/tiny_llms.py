"""Tiny random LLMs of many architectures of transformers, for tests that are about their arithmetic."""

import json
import shutil
from pathlib import Path

import torch
import transformers
from torch import nn

VOCABULARY, WIDTH = 89, 32
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Gemma2": {"final_logit_softcapping": 3.0},  # tied
    "Cohere": {"logit_scale": 0.0625},  # tied; multiplies
    "Granite": {"logits_scaling": 8.0},  # divides
    "HyperCLOVAX": {"logits_scaling": 0.25},  # multiplies by what Granite divides by
    "Phi": {},  # its head has a bias
    "Mixtral": {"num_local_experts": 2},
    "OPT": {"word_embed_proj_dim": WIDTH, "ffn_dim": 48, "init_std": 0.4},  # GPT-like, tied
}


def make(name: str) -> nn.Module:
    """A tiny random LLM of an architecture of transformers; a bias of the head is made to count."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL | ARCHITECTURES[name])
    llm = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    head = llm.get_output_embeddings()
    if head.bias is not None:
        head.bias.normal_()
    return llm


WINDOW = 16  # tokens that a sliding window sees: fewer than any sample has
MIXED = ["sliding_attention", "full_attention"]  # one layer of each kind
OF_TODAY = {
    "Llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "Qwen3": {"tie_word_embeddings": True},
    "Gemma3Text": {"sliding_window": WINDOW, "layer_types": MIXED, "final_logit_softcapping": 3.0},  # tied
    "Mistral": {"sliding_window": WINDOW},
    "Phi3": {"partial_rotary_factor": 0.5},  # Phi 4 as well; queries, keys and values are one linear layer
    "Olmo2": {},
    "SmolLM3": {"no_rope_layers": [1, 0]},
    "GptOss": {"sliding_window": WINDOW, "layer_types": MIXED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "Mixtral": {"num_local_experts": 4},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "Llama4Text": {"num_local_experts": 4, "intermediate_size_mlp": 48, "attention_chunk_size": 8},
    "DeepseekV3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "head_dim": 8,
        "num_key_value_heads": 4,
    },
    "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 4},  # of yesterday; its layers are no linear ones, but Conv1D
}
"""The LLMs that people use now, by the name of their transformers config."""
_CLASSES = {"Gemma3Text": "Gemma3ForCausalLM", "Llama4Text": "Llama4ForCausalLM", "GPT2": "GPT2LMHeadModel"}


def save(name: str, folder: Path, tokenizer: Path) -> Path:
    """A tiny random LLM of today in a folder, with the tokenizer of another."""
    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    words = len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"])
    settings = SMALL | {"hidden_size": 64, "head_dim": 16, "vocab_size": words, "initializer_range": 0.1}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings | OF_TODAY[name])
    llm = getattr(transformers, _CLASSES.get(name, f"{name}ForCausalLM"))(config)
    for parameter in llm.parameters():  # sinks, biases and gains that count
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    llm.save_pretrained(folder)
    return folder
