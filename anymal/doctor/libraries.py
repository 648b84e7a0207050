"""The doctor's checks of AnyMAL itself, of Python, and of the packages that a run imports."""

import importlib.metadata
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import anymal
from anymal.doctor.rows import MISSING, NOTE, OK, Row
from anymal.environment import installed_version

CODECS = {"h264": ["h264"], "hevc": ["hevc"], "vp9": ["vp9", "libvpx-vp9"], "av1": ["libdav1d", "libaom-av1"]}
"""Each codec's decoders in FFmpeg that need no GPU."""

OURS = Path(anymal.__file__).resolve().parent


def installation() -> Iterator[Row]:
    """AnyMAL: which one is imported, and whether that is the one that is installed."""
    found = f"{anymal.__version__}, in {OURS}"
    try:
        distribution = importlib.metadata.distribution("anymal")
    except importlib.metadata.PackageNotFoundError:
        todo = f"pip install -e {OURS.parent}: then it is found from everywhere, and the command anymal is there"
        yield Row("anymal", NOTE, f"{found}, not installed", todo)
        return
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    editable = origin.get("dir_info", {}).get("editable", False)
    folder = url2pathname(urlsplit(origin["url"]).path) if editable else str(distribution.locate_file(""))
    if Path(folder, "anymal").resolve() == OURS:
        yield Row("anymal", OK, f"{found}, installed{' as an editable checkout' if editable else ''}")
    else:
        found += f"; what is installed ({distribution.version}) is in {Path(folder)}"
        yield Row("anymal", NOTE, found, "PYTHONPATH or the working folder hides it; if that is meant, all is well")


def packages() -> Iterator[Row]:
    """Python, and whether the packages that AnyMAL requires are there, and new enough."""
    old = sys.version_info < (3, 11)
    yield Row("Python", MISSING if old else OK, sys.version.split()[0], "take Python 3.11 or later" if old else "")
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in _requirements()]
    wanted = [one for one in wanted if not one.marker or one.marker.evaluate({"extra": ""})]
    bad = 0
    for one in wanted:
        version = installed_version(one.name)
        if not version or not one.specifier.contains(version, prereleases=True):
            bad += 1
            found = f"{version or 'not installed'}; wanted is {one.specifier}"
            yield Row(one.name, MISSING, found, f"pip install '{one}'")
    if not bad:
        yield Row("packages", OK, f"all {len(wanted)} that AnyMAL requires are there, and new enough")


def _requirements() -> list[str]:
    """Of the checkout that this file is in, else of the distribution that is installed."""
    import tomllib  # of Python 3.11

    for folder in Path(__file__).resolve().parents:
        if (folder / "pyproject.toml").is_file():
            project = tomllib.loads((folder / "pyproject.toml").read_text()).get("project", {})
            if project.get("name") == "anymal":
                return project["dependencies"]
    return importlib.metadata.requires("anymal") or []


def other_adapters() -> Iterator[Row]:
    """AdapterHub's distribution: a folder of ours has the same name, but its import name is ``anymal.adapters``."""
    if version := installed_version("adapters"):
        yield Row("adapters", OK, f"{version}, of AdapterHub: it and AnyMAL do not mind one another")


def bitsandbytes_works() -> Iterator[Row]:
    """Whether a tensor survives 4 bits."""
    import bitsandbytes
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensor = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    error = (dequantize_4bit(*quantize_4bit(tensor, quant_type="nf4")) - tensor).abs().mean().item()
    compiled = getattr(bitsandbytes.cextension.lib, "compiled_with_cuda", False)
    found = f"{bitsandbytes.__version__}, with its library for {'GPUs' if compiled else 'CPUs'}; 4 bits on {device}"
    if error < 0.2:
        yield Row("bitsandbytes", OK, f"{found} work")
    else:
        yield Row("bitsandbytes", MISSING, f"{found} are wrong: a mean error of {error:.2g}", "install it anew")


def transformers_works() -> Iterator[Row]:
    """transformers, and torchaudio, which it imports (`anymal` has made that importable)."""
    import torchaudio
    import transformers
    from transformers import AutoModelForCausalLM  # noqa: F401  (imports what `import transformers` leaves for later)

    yield Row("transformers", OK, transformers.__version__)
    yield Row("torchaudio", OK, torchaudio.__version__)


def deepspeed_works() -> Iterator[Row]:
    """DeepSpeed, and what it would take to compile its own kernels, which no run here needs."""
    import deepspeed
    from torch.utils.cpp_extension import CUDA_HOME

    lacks = [name for name in ("ninja", "c++") if not shutil.which(name)] + ["CUDA_HOME"] * (CUDA_HOME is None)
    ops = f"its kernels cannot be compiled without {', '.join(lacks)}; no run needs them" if lacks else "can compile"
    yield Row("DeepSpeed", OK, f"{deepspeed.__version__}; {ops}")


def media() -> Iterator[Row]:
    """What decodes videos and sounds."""
    import av
    import soundfile

    lacks = [name for name, decoders in CODECS.items() if not any(map(_decodes, decoders))]
    has = ", ".join(name for name in CODECS if name not in lacks)
    todo = f"videos in {', '.join(lacks)} will be bad samples: pip install --force-reinstall av" if lacks else ""
    yield Row("av", NOTE if lacks else OK, f"{av.__version__}, decodes {has}", todo)
    yield Row("soundfile", OK, f"{soundfile.__version__}, libsndfile {soundfile.__libsndfile_version__}")


def _decodes(name: str) -> bool:
    from av.codec import Codec

    try:
        return Codec(name, "r").is_decoder
    except ValueError:  # FFmpeg was built without it
        return False


def flash_attention() -> Iterator[Row]:
    """An optional implementation of attention."""
    if version := installed_version("flash-attn"):
        import flash_attn  # noqa: F401

        yield Row("flash-attn", OK, version)
