"""The README.md of a checkpoint: a model card that says what it is, what it was made from, and under which licences."""

import re
from collections.abc import Mapping
from pathlib import Path

from anymal.checkpoints.networks import llm_learns
from anymal.config import settings
from anymal.config.schema import Config
from anymal.modality import Adapter

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def model_card(config: Config, adapters: Mapping[str, Adapter], step: int, llm_license: str) -> str:
    """A model card in Markdown, without secrets.

    Args:
        config: The resolved settings.
        adapters: As the model was made from; each encoder knows its licence.
        step: Optimizer steps done.
        llm_license: The LLM's licence.
    """
    stated = settings.public(config)
    llm = stated["model"]["llm"]["name"]
    as_given = llm == config.model.llm.name  # what holds ${oc.env:NAME} may not even be a path
    on_hub = as_given and _HUB_NAME.fullmatch(llm) and not Path(llm).exists()
    base = f"base_model: {llm}\n" if on_hub else ""
    rows = [f"| LLM | {llm} | {llm_license} |"]
    for name, adapter in adapters.items():
        encoder = stated["model"]["modalities"][name]["encoder"]
        rows.append(f"| {name} encoder | {encoder} | {adapter.encoder.license} |")
    datasets = ", ".join(config.data.datasets) or str(stated["data"]["shards"])
    rows.append(f"| data | {datasets} | {stated['run']['data_license'] or 'not stated (run.data_license)'} |")
    listed = "\n".join(rows)
    return f"""---
{base}library_name: anymal
---
# AnyMAL adapters for {llm if on_hub else Path(llm).name}

Projectors for {", ".join(adapters)}, trained for {step} steps {_beside(config)}
(trained: {", ".join(config.train)}).

Beside the same LLM at another precision they may answer differently, or not at all: `precision.json`, if it is there,
says what was measured, and `anymal evaluate bits=[4,16,32]` measures it.

| part | source | licence |
|---|---|---|
{listed}

Use: `anymal chat checkpoint=THIS_FOLDER "prompt"`. All settings are in `recipe.yaml`.
"""


def _beside(config: Config) -> str:
    if llm_learns(config.train):
        return f"together with the LLM in `llm/` ({config.model.llm.bits} bits)"
    return f"with the LLM held frozen at {config.model.llm.bits} bits"
