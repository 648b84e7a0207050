"""Tiny random LLMs of many architectures of transformers, for tests that are about their arithmetic."""

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
