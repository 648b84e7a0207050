"""The doctor's checks of the machine: its driver, cores, memory, disks, scheduler, accounts."""

import netrc
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from anymal.doctor.rows import GIB, NOTE, OK, Row, output

NETWORK = {"nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "9p", "afs", "wekafs"}


def driver() -> Iterator[Row]:
    """NVIDIA's driver."""
    version = driver_version()
    yield Row("NVIDIA driver", OK if version else NOTE, version or "none")


def driver_version() -> str:
    if shutil.which("nvidia-smi"):
        try:
            return output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        except subprocess.SubprocessError:  # the tool is there, the driver is not
            return ""
    file = Path("/proc/driver/nvidia/version")
    return file.read_text().splitlines()[0] if file.is_file() else ""


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
    folders = {"ANYMAL_CACHE": own, "HF_HOME": _hub_home(), "TMPDIR": Path(tempfile.gettempdir())}
    for name, named in folders.items():
        folder = named.absolute()
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
    yield Row("Slurm", NOTE if lacks else OK, f"{output(found[0], '--version')}, {where}", lacks)


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
