"""docs/glossary.md names files that are there, and a grep for the field's words leads to the right ones."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GREP = {
    "activation checkpointing": "model/activation_checkpointing.py",
    "attention mask": "model/attention.py",
    "bootstrap": "evaluation/metrics.py",
    "collate": "data/packing.py",
    "confidence interval": "evaluation/metrics.py",
    "data parallel": "training/loop.py",
    "gradient accumulation": "training/loop.py",
    "gradient clipping": "training/loop.py",
    "hallucination": "evaluation/metrics.py",
    "learning rate schedule": "training/loop.py",
    "log-likelihood": "evaluation/evaluate.py",
    "mixed precision": "training/loop.py",
    "prefetch": "training/prefetch.py",
    "sequence packing": "data/packing.py",
    "token embedding": "model/llm.py",
}
"""What somebody looks for → the file in which they find it, or where it is."""


@pytest.mark.parametrize(("words", "file"), GREP.items(), ids=list(GREP))
def test_a_grep_for_the_fields_words_finds_the_place(words, file):
    assert words in (ROOT / "anymal" / file).read_text().lower()


def test_the_glossary_names_files_that_are_there():
    current, _, _renamed = (ROOT / "docs" / "glossary.md").read_text().partition("\n## Renamed")
    named = re.findall(r"`([\w/]+(?:\.py|/))`", current)
    assert len(named) > 60
    for name in named:
        assert (ROOT / "anymal" / name).exists(), name
    for page in re.findall(r"\]\(([\w./]+)\)", current):
        assert (ROOT / "docs" / page).is_file(), page
