"""What a checkpoint's files must be: ``manifest.json`` beside them, written last, compared before they are loaded.

    {"version": 1, "files": {"adapters/image/model.safetensors": {"size": 1048576, "sha256": "…"}, …}}

The card, the recipe, the descriptions of projectors and the tokenizer are for people to edit, so they need not be what
they were; ``training/`` may be taken out as a whole before a checkpoint is published. Of an older checkpoint, which
has no manifest, the headers of the weights alone can be checked.
"""

import hashlib
import json
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open

MANIFEST = "manifest.json"
TRAINING = "training"
_EDITABLE = re.compile(r"(.+/)?README\.md|recipe\.yaml|adapters/[^/]+/adapter_config\.json|tokenizer/.*")
_LARGEST = 1 << 26  # bytes of a manifest
_THREADS = 8
_log = logging.getLogger(__name__)
_known: dict[tuple[int, ...], str] = {}  # device, inode, size and time of a file → digest; of a hard link, too


def forget() -> None:
    """From now on each file is hashed anew: bytes rot without a new time, and inodes are given again."""
    _known.clear()


def write(folder: Path) -> None:
    """Write the manifest of all files in a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_THREADS) as pool:  # hashlib and reading let go of the lock
        digests = list(pool.map(_sha256, paths))
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    }
    (folder / MANIFEST).write_text(json.dumps({"version": 1, "files": files}, indent=1))


def damage(folder: Path, *, training: bool) -> str:
    """What is wrong with a checkpoint's files, as a sentence that names the first; empty if nothing is.

    Args:
        folder: The checkpoint. Each file is hashed once until `forget`, however often it is asked for.
        training: Whether the state of training is looked at, too, if the checkpoint has any; it is most of the bytes.
    """
    stripped = not (folder / TRAINING).exists()
    training = training and not stripped
    path = folder / MANIFEST
    if not path.exists():
        _log.warning("%s has no %s, as older checkpoints: its weights cannot be verified", folder, MANIFEST)
        return _damaged_header(folder, training)
    try:
        with path.open("rb") as file:
            files = {str(name): (entry["size"], entry["sha256"]) for name, entry in _listed(file.read(_LARGEST))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{path} is damaged: {error}"
    wanted = {name: known for name, known in files.items() if training or not name.startswith(f"{TRAINING}/")}
    with ThreadPoolExecutor(_THREADS) as pool:
        faults = pool.map(lambda item: _wrong(folder, item[0], *item[1]), wanted.items())
        return next((fault for fault in faults if fault), "")


def _listed(data: bytes) -> list[tuple[str, dict]]:
    return list(json.loads(data)["files"].items())


def _wrong(folder: Path, name: str, size: int, digest: str) -> str:
    path = folder / name
    if os.path.isabs(name) or ".." in Path(name).parts:  # a stranger's manifest must not make us read elsewhere
        return f"{folder / MANIFEST} is damaged: it lists {name!r}"
    if _EDITABLE.fullmatch(name):
        return _unreadable(path)
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != size:
        return f"{path} is damaged: it has {path.stat().st_size:,} bytes where {MANIFEST} says {size:,}"
    if _sha256(path) != digest:
        return f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}"
    return ""


def _unreadable(path: Path) -> str:
    """Why a file that may have been edited is none any more."""
    if path.name not in ("adapter_config.json", "recipe.yaml"):  # nothing of ours reads the others
        return ""
    try:
        content = json.loads(path.read_text()) if path.suffix == ".json" else OmegaConf.load(path)
    except Exception as error:  # YAML's errors have no base class in common with the others
        return f"{path} is missing or damaged: {' '.join(str(error).split())}"
    holds_settings = isinstance(content, dict) or OmegaConf.is_dict(content)
    return "" if holds_settings else f"{path} is missing or damaged: no settings"


def _damaged_header(folder: Path, training: bool) -> str:
    for path in sorted(folder.rglob("*.safetensors")):
        if training or path.parent != folder / TRAINING:
            try:
                with safe_open(path, "pt"):
                    pass
            except (OSError, SafetensorError) as error:
                return f"{path} is damaged: {error}"
    return ""


def _sha256(path: Path) -> str:
    stat = path.stat()
    key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if key not in _known:
        with path.open("rb") as file:
            _known[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _known[key]
