"""What people run: thin programs over `anymal` and `adapters`, their recipes, and DeepSpeed settings."""

import anymal  # noqa: F401  # isort: skip  (first: it prepares the process for torch)
from anymal import adapters

if not hasattr(adapters, "MODALITIES"):  # PyPI has another distribution whose import name is adapters
    raise SystemExit(
        f"error: {adapters.__file__} is not AnyMAL's package `adapters` but the PyPI distribution of that name.\n"
        "Use an environment of its own (make install makes one in .venv), or: pip uninstall adapters; pip install -e ."
    )
