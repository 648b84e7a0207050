"""The glossary and the trip of a sample name what is there; a grep for the field's words leads to the right place."""

import ast
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


def test_the_trip_of_a_sample_names_functions_that_are_there():
    steps = re.findall(
        r"^\|.*\| `([\w/]+\.py)` \| (.+) \|$", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE
    )
    assert len(steps) > 25
    for file, functions in steps:
        names = _defined(ROOT / "anymal" / file)
        for name in re.findall(r"`(\w+(?:\.\w+)?)`", functions.partition(", where")[0]):
            assert name in names, f"{file} has no {name}"


def _defined(path: Path) -> set[str]:
    """Functions and classes of a file, methods as ``Class.method``."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return names
