"""What LLM.int8() costs an LLM at 8 bits, with and without its outlier columns (``model.llm.int8_threshold``).

    make demo && .venv/bin/python benchmarks/int8_threshold.py

Takes the demo's LLM, and as text the pages of docs/. On a GPU an 8-bit layer rounds its input to 8 bits, too; on a CPU
it does so in eval mode alone, which no run uses, and which stands for the GPU here. The loss is the mean over 4,096
tokens in rows of 512. The goal: with outlier columns less is lost than without. An LLM of 135M says little about one of
8B, whose outliers are larger (Dettmers and others, arXiv 2208.07339).
"""

import anymal  # noqa: F401  # isort: skip  (first: it prepares the process for torch)
import logging
from pathlib import Path

import torch
from bitsandbytes.nn import Linear8bitLt
from torch import Tensor, nn

from anymal.config.command_line import run_program
from anymal.config.schema import LLMConfig
from anymal.data_prep.demo.assets import cache_folder
from anymal.model.llm import load_llm

CPU, ROWS, TOKENS = torch.device("cpu"), 8, 512
DOCS = Path(__file__).resolve().parent.parent / "docs"


def text() -> str:
    """The pages whose names come first."""
    return "\n".join(path.read_text() for path in sorted(DOCS.glob("*.md")))[:40_000]


@torch.no_grad()
def mean_loss(llm: nn.Module, rows: Tensor) -> float:
    """Over the next tokens of [ROWS, TOKENS]."""
    return sum(llm(input_ids=row[None], labels=row[None], use_cache=False).loss.item() for row in rows) / len(rows)


def as_on_a_gpu(llm: nn.Module) -> list[bool]:
    """Let the 8-bit layers round their inputs; filled, as they run, with whether an input had an outlier column."""
    found: list[bool] = []
    for module in llm.modules():
        if isinstance(module, Linear8bitLt):
            module.training = False
            limit = LLMConfig(name="x").int8_threshold
            module.register_forward_pre_hook(
                lambda _, given, at=limit: found.append(bool((given[0].abs() >= at).any()))
            )
    return found


def main() -> None:
    """Print the table."""
    logging.getLogger("transformers").setLevel(logging.ERROR)  # the text is longer than the LLM's context
    name, default = str(cache_folder() / "models" / "llm"), LLMConfig(name="x").int8_threshold
    llm, tokenizer = load_llm(LLMConfig(name=name, bits=32), CPU)
    rows = tokenizer(text(), return_tensors="pt").input_ids[:, : ROWS * TOKENS].view(ROWS, TOKENS)
    base = mean_loss(llm, rows)
    print(f"float32                                 {base:.4f}")
    lost = {}
    for threshold in (default, 0.0):
        llm, _ = load_llm(LLMConfig(name=name, bits=8, int8_threshold=threshold), CPU)
        if threshold:
            print(f"weights alone in 8 bits (a CPU)         {mean_loss(llm, rows):.4f}")
        outliers = as_on_a_gpu(llm)
        loss = mean_loss(llm, rows)
        lost[threshold] = loss - base
        print(f"inputs in 8 bits, too, threshold {threshold:<6g} {loss:.4f}")
    met = lost[default] < lost[0.0]
    share = sum(outliers) / len(outliers)
    print(
        f"int8_threshold lost_with={lost[default]:.4f} lost_without={lost[0.0]:.4f} layers_with_outliers={share:.0%} "
        f"goal={'met' if met else 'missed'}"
    )


if __name__ == "__main__":
    run_program(main)
