"""The doctor's checks of torch and the GPUs: whether its build, the driver and the cards fit one another."""

import re
from collections.abc import Iterator, Sequence

from anymal.doctor.machine import driver_version
from anymal.doctor.rows import GIB, NOTE, OK, Row

DRIVERS = {12: 525, 13: 580}
"""CUDA's major version → the oldest series of NVIDIA's driver that runs it, whatever its minor version."""
LEAST = {12: (5, 0), 13: (7, 5)}
"""CUDA's major version → the least compute capability that it compiles for."""
INDEXES = {12: "https://download.pytorch.org/whl/cu126", 13: "https://download.pytorch.org/whl/cu130"}
"""CUDA's major version → where torch's wheels for it are; those of PyPI are for 13."""


def torch_and_gpus() -> Iterator[Row]:
    """torch, its GPUs, NCCL."""
    import torch

    from anymal.model.precision import hardware

    version, cuda, driver = torch.__version__, torch.version.cuda, driver_version()
    kind = f"CUDA {cuda}" if cuda else "CPU"
    kind = f"ROCm {torch.version.hip}" if torch.version.hip else kind
    usable = torch.cuda.is_available()
    todo = driver_remedy(version, cuda, driver) if driver and not usable else ""
    yield Row("torch", NOTE if todo else OK, f"{version}, built for {kind}", todo)
    for i in range(torch.cuda.device_count() if usable else 0):
        gpu, (free, total) = torch.cuda.get_device_properties(i), torch.cuda.mem_get_info(i)
        found = f"{gpu.name}, {total / GIB:.0f} GiB ({free / GIB:.0f} free), compute capability {gpu.major}.{gpu.minor}"
        capability = hardware(torch.device("cuda", i)).capability
        todo = gpu_remedy(version, cuda, capability, torch.cuda.get_arch_list()) if capability else ""
        yield Row(f"GPU {i}", NOTE if todo else OK, found, todo)
    if not usable:
        yield Row("GPU", NOTE, "none", "all is computed on the CPU, in float32: enough for the demo")
    elif torch.distributed.is_nccl_available():
        yield Row("NCCL", OK, ".".join(map(str, torch.cuda.nccl.version())))


def driver_remedy(version: str, cuda: str | None, driver: str) -> str:
    """What to do where there is an NVIDIA driver, but torch cannot use it.

    Args:
        version: torch's.
        cuda: The CUDA that it was built for; None for a build without.
        driver: What the driver says of itself.
    """
    found = re.search(r"\b(\d{3})\.\d+", driver)
    if not found:
        return "there is an NVIDIA driver, but this torch cannot use it: install a build for a CUDA that it supports"
    series = int(found[1])
    runs = max((major for major, least in DRIVERS.items() if series >= least), default=0)
    if not runs:
        return f"driver {series} is too old for any build of torch: install driver {max(DRIVERS.values())} or later"
    if not cuda:
        return f"there is a driver, but this torch was built without CUDA: {_install(version, runs)}"
    built = int(cuda.split(".")[0])
    if built > runs:
        wants = f"CUDA {built} wants driver {DRIVERS.get(built, max(DRIVERS.values()))} or later, this is {series}"
        return f"{wants}: update the driver, or {_install(version, runs)}"
    return "the driver is new enough for it: is a GPU visible (nvidia-smi -L, CUDA_VISIBLE_DEVICES)?"


def gpu_remedy(version: str, cuda: str | None, capability: tuple[int, int], compiled: Sequence[str]) -> str:
    """What to do about a card, or what it cannot do; empty if it can do all.

    Args:
        version: torch's.
        cuda: The CUDA that it was built for.
        capability: The card's compute capability.
        compiled: What torch has kernels for, as ``torch.cuda.get_arch_list`` says it: sm_80 (machine code, for later
            minor versions, too), compute_90 (to be compiled for whatever is later).
    """
    from anymal.model.precision import Hardware, limits

    kernels = [(kind, (int(digits[:-1]), int(digits[-1]))) for kind, digits in map(_arch, compiled)]
    runs = any(
        level <= capability and (kind == "compute" or level[0] == capability[0]) for kind, level in kernels
    )  # fmt: skip
    if kernels and not runs:
        fits = 12 if capability < LEAST[13] else 13
        wants = f"{_install(version, fits)} (driver {DRIVERS[fits]} or later)"
        return f"this torch (CUDA {cuda}) has no kernels for it: {wants}"
    return limits(Hardware(kind="cuda", capability=capability))


def _arch(name: str) -> tuple[str, str]:
    kind, _, digits = name.partition("_")
    return kind, digits.rstrip("af")  # sm_90a, sm_100f: for one version or family


def _install(version: str, cuda: int) -> str:
    return f"pip install --force-reinstall torch=={version.split('+')[0]} --index-url {INDEXES[cuda]}"
