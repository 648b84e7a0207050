"""A made-up modality: three receptors."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from anymal.errors import BadSample
from anymal.modality import Modality


@dataclass(kw_only=True)
class SmellOptions:
    """Settings."""

    strength: float = 1.0
    """What a reading is multiplied by."""


class Receptors(nn.Module):
    width, tokens, license = 3, 1, "none"

    def __init__(self, strength):
        super().__init__()
        self.strength = strength

    @staticmethod
    def decode(data):
        if len(data) != 12:
            raise BadSample(f"holds {len(data)} bytes, a smell has 12")
        return torch.from_numpy(np.frombuffer(data, dtype=np.float32).copy())

    def forward(self, media):
        return media[:, None] * self.strength


MODALITY = Modality(
    name="smell", suffixes=("smell",), options=SmellOptions, load=lambda name, options: Receptors(options.strength)
)
