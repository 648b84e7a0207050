"""What `anymal.checkpoints.build` makes and `anymal.checkpoints.checkpoint` saves."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from anymal.data.prepare import Prepare
from anymal.modality import Adapter
from anymal.model.multimodal import AnyMAL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Built:
    """A model and what belongs to it."""

    model: AnyMAL
    """LLM, encoders, projectors, on the device."""
    adapters: dict[str, Adapter]
    """What the model was made from, by modality."""
    tokenizer: "PreTrainedTokenizerBase"
    """The LLM's, with the placeholder tokens."""
    prepare: Prepare
    """Decoding and prompt, for the stream's workers."""
    llm_license: str
    """The LLM's licence: what ``model.llm.license`` states, or else its own model card; ``"unknown"`` otherwise."""
