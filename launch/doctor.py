"""What this machine has, and what to do about what is missing: a table.

    python launch/doctor.py
    python launch/doctor.py json=true      # the same for programs: a list of rows

Each row says what, its state, what was found, and if there is something to do, what. The state is

    ok        it is there
    note      a run works without it, or with less
    missing   a run needs it

The exit code is 0 if nothing is missing (no GPU is a note), and 1 otherwise. Of tokens and logins it says only whether
there are any.

Only the standard library is imported here: whatever is broken becomes a row. Libraries that may end a process are
imported by processes of their own, which run beside one another.
"""

import dataclasses
import importlib.metadata
import importlib.util
import inspect
import json
import netrc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

OK, NOTE, MISSING = "ok", "note", "missing"
PATIENCE = 120.0  # seconds until a library is taken for hanging; a cold network file system takes long
GIB = 2**30
NETWORK = {"nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "9p", "afs", "wekafs"}
CODECS = {"h264": ["h264"], "hevc": ["hevc"], "vp9": ["vp9", "libvpx-vp9"], "av1": ["libdav1d", "libaom-av1"]}
"""Each codec's decoders in FFmpeg that need no GPU."""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    what: str
    state: str
    found: str
    todo: str = ""
    """What to do about it; empty if there is nothing to do."""


def packages() -> Iterator[Row]:
    """Python, and whether the packages that AnyMAL requires are there, and new enough."""
    old = sys.version_info < (3, 11)
    yield Row("Python", MISSING if old else OK, sys.version.split()[0], "take Python 3.11 or later" if old else "")
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in _requirements()]
    wanted = [one for one in wanted if not one.marker or one.marker.evaluate({"extra": ""})]
    bad = 0
    for one in wanted:
        try:
            version = importlib.metadata.version(one.name)
        except importlib.metadata.PackageNotFoundError:
            version = ""
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


def foreign_adapters() -> Iterator[Row]:
    """AdapterHub's distribution has the import name of a package of ours."""
    try:
        theirs = importlib.metadata.distribution("adapters")
    except importlib.metadata.PackageNotFoundError:
        return
    spec = importlib.util.find_spec("adapters")
    hides = spec is not None and spec.origin == str(theirs.locate_file("adapters/__init__.py"))
    harmless = not hides or importlib.util.find_spec("anymal.adapters") is not None
    todo = "" if harmless else "pip uninstall adapters, then install AnyMAL again; or use an environment of its own"
    found = f"another package of that name is installed ({theirs.version})"
    yield Row("adapters", NOTE if harmless else MISSING, found + ("" if harmless else ", and hides ours"), todo)


def torch_and_gpus() -> Iterator[Row]:
    """torch, its GPUs, NCCL."""
    import torch

    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    kind = f"ROCm {torch.version.hip}" if torch.version.hip else kind
    usable, todo = torch.cuda.is_available(), ""
    if not usable and _driver():
        todo = "there is an NVIDIA driver, but this torch cannot use it: install a build for a CUDA that it supports"
    yield Row("torch", NOTE if todo else OK, f"{torch.__version__}, built for {kind}", todo)
    for i in range(torch.cuda.device_count() if usable else 0):
        gpu, (free, total) = torch.cuda.get_device_properties(i), torch.cuda.mem_get_info(i)
        found = f"{gpu.name}, {total / GIB:.0f} GiB ({free / GIB:.0f} free), compute capability {gpu.major}.{gpu.minor}"
        old = torch.version.cuda is not None and gpu.major < 8
        yield Row(f"GPU {i}", NOTE if old else OK, found, "it has no bfloat16, so it will be slow" if old else "")
    if not usable:
        yield Row("GPU", NOTE, "none", "all is computed on the CPU, in float32: enough for the demo")
    elif torch.distributed.is_nccl_available():
        yield Row("NCCL", OK, ".".join(map(str, torch.cuda.nccl.version())))


def driver() -> Iterator[Row]:
    """NVIDIA's driver."""
    version = _driver()
    yield Row("NVIDIA driver", OK if version else NOTE, version or "none")


def _driver() -> str:
    if shutil.which("nvidia-smi"):
        try:
            return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        except subprocess.SubprocessError:  # the tool is there, the driver is not
            return ""
    file = Path("/proc/driver/nvidia/version")
    return file.read_text().splitlines()[0] if file.is_file() else ""


def _output(*command: str) -> str:
    """The first line that a command says."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return (done.stdout.splitlines() or [""])[0].strip()


def bitsandbytes_works() -> Iterator[Row]:
    """Whether a tensor survives 4 bits."""
    import bitsandbytes
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    place = "cuda" if torch.cuda.is_available() else "cpu"
    tensor = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(place)
    error = (dequantize_4bit(*quantize_4bit(tensor, quant_type="nf4")) - tensor).abs().mean().item()
    compiled = getattr(bitsandbytes.cextension.lib, "compiled_with_cuda", False)
    found = f"{bitsandbytes.__version__}, with its library for {'GPUs' if compiled else 'CPUs'}; 4 bits on {place}"
    if error < 0.2:
        yield Row("bitsandbytes", OK, f"{found} work")
    else:
        yield Row("bitsandbytes", MISSING, f"{found} are wrong: a mean error of {error:.2g}", "install it anew")


def transformers_works() -> Iterator[Row]:
    """transformers, and torchaudio, which it imports."""
    importlib.import_module("anymal")  # first: it makes torchaudio importable
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
    try:
        version = importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return
    import flash_attn  # noqa: F401

    yield Row("flash-attn", OK, version)


def machine() -> Iterator[Row]:
    """Cores, memory, shared memory: as far as this process may use them."""
    cores = len(os.sched_getaffinity(0))
    quota = min((limit / period for limit, period in _cgroup("cpu", "cpu.max", "cpu.cfs_quota_us")), default=cores)
    yield Row("CPU", OK, f"{cores} cores" + (f", of which the cgroup gives {quota:g}" if quota < cores else ""))
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    most = min([total, *(limit for limit, _ in _cgroup("memory", "memory.max", "memory.limit_in_bytes"))])
    found = f"{total / GIB:.1f} GiB ({free / GIB:.1f} free)"
    found += f", of which the cgroup gives {most / GIB:.1f}" if most < total else ""
    yield Row("memory", NOTE if most < 4 * GIB else OK, found, "enough for tiny models" if most < 4 * GIB else "")
    shared = shutil.disk_usage("/dev/shm").total
    todo = "NCCL between several GPUs wants more: start the container with --shm-size=1g" if shared < GIB / 2 else ""
    yield Row("/dev/shm", NOTE if todo else OK, f"{shared / GIB:.2g} GiB", todo)


def _cgroup(controller: str, version_2: str, version_1: str) -> Iterator[tuple[int, int]]:
    """Each limit that this process's cgroup and those above it set, and the period that it is for, if it is of time."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup", controllers)
        for folder in (root / path.lstrip("/"), *(root / path.lstrip("/")).parents):
            file, period = folder / (version_1 if controllers else version_2), folder / "cpu.cfs_period_us"
            limit, *more = file.read_text().split() if file.is_file() else ["max"]
            if limit not in ("max", "-1"):
                yield int(limit), int(more[0] if more else period.read_text() if period.is_file() else 1)


def disks() -> Iterator[Row]:
    """The folders that fill up."""
    own = Path(os.environ.get("ANYMAL_CACHE") or "~/.cache/anymal").expanduser()
    places = {"ANYMAL_CACHE": own, "HF_HOME": _hub_home(), "TMPDIR": Path(tempfile.gettempdir())}
    for name, place in places.items():
        folder = place.absolute()
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free, kind, todo = shutil.disk_usage(there).free, _file_system(there.resolve()), ""
        if free < 10 * GIB:
            todo = "little room: a model of 8 B parameters takes 16 GB"
        if network := kind in NETWORK or kind.startswith("fuse."):
            todo = f"a network file system: small files are slow there; let {name} name a folder on a local disk"
        if not os.access(there, os.W_OK):
            todo = f"it cannot be written to; let {name} name another folder"
        on = f"on {kind}{', a network file system' if network else ''}"
        yield Row(name, NOTE if todo else OK, f"{folder}: {free / GIB:.0f} GiB free, {on}", todo)


def _hub_home() -> Path:
    """The folder of huggingface_hub's cache and token, by its own rules."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{caches}/huggingface").expanduser()


def _file_system(folder: Path) -> str:
    """The type of the file system that holds a folder."""
    best, kind = Path("/"), "?"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        point = Path(before.split()[4].replace(r"\040", " "))
        if folder.is_relative_to(point) and len(point.parts) >= len(best.parts):
            best, kind = point, after.split()[0]
    return kind


def slurm() -> Iterator[Row]:
    """The cluster's scheduler."""
    found = [name for name in ("sbatch", "srun") if shutil.which(name)]
    if not found:
        yield Row("Slurm", NOTE, "none: jobs cannot be submitted from here")
        return
    job = os.environ.get("SLURM_JOB_ID")
    lacks = "" if len(found) == 2 else f"only {found[0]} is on PATH"
    where = f"inside job {job}" if job else "not inside a job"
    yield Row("Slurm", NOTE if lacks else OK, f"{_output(found[0], '--version')}, {where}", lacks)


def accounts() -> Iterator[Row]:
    """Whether hub and W&B are reachable, in words: neither a token nor a key is read out."""
    file = Path(os.environ.get("HF_TOKEN_PATH") or _hub_home() / "token")
    token = bool(os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")) or file.is_file()
    switch = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    offline = switch.upper() in ("1", "ON", "YES", "TRUE")
    found = f"{'offline (HF_HUB_OFFLINE)' if offline else 'online'}, {'with a token' if token else 'no token'}"
    yield Row("hub", OK if token or offline else NOTE, found, "" if token else "gated models want hf auth login")
    mode = os.environ.get("WANDB_MODE", "online")
    login = bool(os.environ.get("WANDB_API_KEY")) or _in_netrc("api.wandb.ai")
    todo = "run.wandb=online wants wandb login" if mode == "online" and not login else ""
    yield Row("W&B", NOTE if todo else OK, f"{mode}, {'logged in' if login else 'not logged in'}", todo)


def _in_netrc(host: str) -> bool:
    file = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    return file.is_file() and host in netrc.netrc(file).hosts


CHECKS: dict[str, tuple[Callable[[], Iterator[Row]], str]] = {
    "packages": (packages, ""),
    "adapters": (foreign_adapters, ""),
    "torch": (torch_and_gpus, "pip install --force-reinstall torch"),
    "NVIDIA driver": (driver, ""),
    "bitsandbytes": (bitsandbytes_works, "install bitsandbytes anew, for this torch's CUDA"),
    "transformers": (transformers_works, "install transformers anew, and a torchaudio for this torch"),
    "DeepSpeed": (deepspeed_works, "install DeepSpeed anew; some versions want CUDA_HOME to be set"),
    "flash-attn": (flash_attention, "uninstall it, or install it anew for this torch"),
    "media": (media, "install av and soundfile anew"),
    "machine": (machine, ""),
    "disks": (disks, ""),
    "Slurm": (slurm, ""),
    "accounts": (accounts, ""),
}
"""What is looked at, and what to do if that fails. Where there is something to do, it runs in a process of its own."""


def examine() -> list[Row]:
    """All rows, in the table's order."""
    ends = time.monotonic() + PATIENCE
    started = {name: _start(name) for name, (_, todo) in CHECKS.items() if todo}
    here = {name: look(name) for name in CHECKS if name not in started}
    return [row for name in CHECKS for row in (here[name] if name in here else _end(name, started[name], ends))]


def look(name: str) -> list[Row]:
    """The rows of one check; what it raises is one."""
    check, todo = CHECKS[name]
    rows: list[Row] = []
    try:
        for row in check():
            rows.append(row)
    except Exception as error:  # whatever a broken library, or an unknown system, raises
        said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        rows.append(Row(name, MISSING if todo else NOTE, said, todo or "this could not be looked at"))
    return rows


def _start(name: str) -> subprocess.Popen:
    """A process that looks at `name`; it imports what this one would, but nothing that lies beside this file."""
    path = [place for place in sys.path if place and Path(place) != Path(__file__).parent]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-P", __file__, f"look={name}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def _end(name: str, process: subprocess.Popen, ends: float) -> list[Row]:
    """The rows that it found until then; it is ended if it takes longer."""
    try:
        said, complained = process.communicate(timeout=max(0.0, ends - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return [Row(name, MISSING, f"does not answer within {PATIENCE:.0f} s", CHECKS[name][1])]
    if process.returncode == 0:
        return [Row(*row) for row in json.loads(said.splitlines()[-1])]
    how = f"ends with code {process.returncode}"
    if process.returncode < 0:
        how = f"dies of {signal.Signals(-process.returncode).name}"
    return [Row(name, MISSING, f"{how}: {(complained.splitlines() or [''])[-1][:200]}", CHECKS[name][1])]


def table(rows: list[Row]) -> str:
    """The rows as text, what to do in lines of their own."""
    width = max(len(row.what) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{row.state:<7}  {row.what:<{width}}  {row.found}")
        lines += [f"{'':<7}  {'':<{width}}  → {row.todo}"] if row.todo else []
    lacks = [row.what for row in rows if row.state == MISSING]
    return "\n".join([*lines, "", f"missing: {', '.join(lacks)}" if lacks else "all that a run needs is there"])


def main() -> int:
    """Print the table; 0 if nothing is missing."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in ("-h", "--help"):
        print(inspect.cleandoc(__doc__))
        return 0
    if len(arguments) == 1 and arguments[0].startswith("look="):  # what `_start` asks for
        print(json.dumps([dataclasses.astuple(row) for row in look(arguments[0].removeprefix("look="))]))
        return 0
    if arguments not in ([], ["json=true"], ["json=false"]):
        print(f"error: {' '.join(arguments)}: all that can be given is json=true, or --help", file=sys.stderr)
        return 2
    rows = examine()
    print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) if "json=true" in arguments else table(rows))
    return int(any(row.state == MISSING for row in rows))


def start() -> None:
    """Run the program, for the command line."""
    sys.exit(main())


if __name__ == "__main__":
    start()
