"""A toy modality whose every position can be checked: its embeddings say which medium and which token they are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anymal.adapters import REGISTRY
from anymal.checkpoints import build
from anymal.config.schema import LLMConfig, ProjectorConfig, PromptConfig
from anymal.data.prompt import Prompt
from anymal.modality import Adapter, Modality
from anymal.model.llm import load_llm
from anymal.model.multimodal import AnyMAL
from anymal.model.registry import Fit
from anymal.sample import TEXT, Message, Part, Sample


@dataclass(kw_only=True)
class ToyOptions:
    """None."""


def decode(data: bytes) -> Tensor:
    """Bytes of float32 → [values]."""
    return torch.from_numpy(np.frombuffer(data, dtype=np.float32).copy())


class ToyEncoder(nn.Module):
    """Medium (v,) → features [tokens, width]; feature i is v + 0.01 i in its first channel, 1 in its second."""

    license, shape = "none", (1,)
    decode = staticmethod(decode)

    def __init__(self, tokens: int = 3, width: int = 4):
        super().__init__()
        self.tokens, self.width = tokens, width
        self.one = nn.Parameter(torch.ones(1))

    def forward(self, media: Tensor) -> Tensor:
        features = torch.zeros(len(media), self.tokens, self.width, device=media.device)
        features[:, :, 0] = (media[:, :1] + 0.01 * torch.arange(self.tokens, device=media.device)) * self.one
        features[:, :, 1] = 1
        return features


class ToyProjector(nn.Module):
    """Each feature → its channels repeated over the LLM's width, times a trained scale that starts at one."""

    def __init__(self, tokens: int, width: int, llm_width: int):
        super().__init__()
        self.tokens, self.repeat = tokens, llm_width // width
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, features: Tensor) -> Tensor:
        return features.repeat(1, 1, self.repeat) * self.scale


def toy_adapters(llm_width: int, **tokens: int) -> dict[str, Adapter]:
    """An adapter for each name, with so many tokens."""
    found = {}
    for name, count in tokens.items():
        modality = Modality(name=name, suffixes=(f"{name}.bin",), options=ToyOptions, load=lambda *_: ToyEncoder())
        found[name] = Adapter(modality, ToyEncoder(count), ToyProjector(count, 4, llm_width))
    return found


def toy_model(
    folder: Path, *, bits: int = 32, attention: str = "packed", device: str = "cpu", **tokens: int
) -> tuple[AnyMAL, Prompt]:
    """A model with toy adapters on the tiny LLM, and its prompt."""
    llm, tokenizer = load_llm(LLMConfig(name=str(folder), bits=bits, attention=attention), torch.device(device))
    adapters = toy_adapters(llm.config.hidden_size, **tokens)
    return AnyMAL(llm, adapters), prompt_of(tokenizer, adapters)


def prompt_of(tokenizer: Any, adapters: dict[str, Adapter]) -> Prompt:
    """How samples of these modalities become text."""
    return Prompt(
        tokenizer=tokenizer,
        config=PromptConfig(),
        placeholder={name: adapter.modality.placeholder for name, adapter in adapters.items()},
        length={name: adapter.tokens for name, adapter in adapters.items()},
    )


def text(content: str) -> Part:
    """A part that is text."""
    return Part(kind=TEXT, content=content)


def medium(kind: str, value: float) -> Part:
    """A decoded toy medium."""
    return Part(kind=kind, content=torch.tensor([value]))


def sample(*parts: Part, answer: str = "yes", key: str = "k") -> Sample:
    """One question and its answer."""
    messages = [Message(role="user", parts=list(parts)), Message(role="assistant", parts=[text(answer)])]
    return Sample(key=key, shard="s.tar", messages=messages)


def build_projector(
    config: ProjectorConfig, parts: list[tuple[int, int]], llm_width: int, scale: float = 1.0, *, llm_layers: int = 0
) -> nn.Module:
    """One of our projectors for features of these parts."""
    fit = Fit(parts=parts, llm_width=llm_width, scale=scale, llm_layers=llm_layers)
    return build.build_projector(REGISTRY, config, fit)
