"""What `anymal doctor` says of this machine, and of one where much is broken; its libraries are real files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import anymal
from anymal.doctor import examine, gpus
from anymal.doctor.rows import Row
from distributions import distribution
from small_runs import ROOT, environment


def run(*arguments: str, path: tuple[Path, ...] = (), **variables: str) -> subprocess.CompletedProcess:
    """The program, with folders before all others on its path."""
    env = environment() | variables | {"PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT]))}
    command = [sys.executable, str(ROOT / "launch" / "doctor.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)


def rows_of(said: str) -> dict[str, dict[str, str]]:
    return {row["what"]: row for row in json.loads(said)}


def look(name: str, *path: Path) -> list[list[str]]:
    """The rows of one check, as the process has them that looks at it."""
    env = environment() | {"PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT]))}
    command = [sys.executable, "-P", "-m", "anymal.doctor.examine", name]
    return json.loads(subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout)


@pytest.mark.slow
def test_here_nothing_is_missing():
    done = run()
    assert done.returncode == 0, done.stdout
    assert done.stdout.rstrip().endswith("all that a run needs is there") and done.stderr == ""
    states = {line.split()[0] for line in done.stdout.splitlines() if line and line[0] != " "}
    assert states <= {"ok", "note", "all"}
    for what in ("Python", "torch", "GPU", "bitsandbytes", "transformers", "DeepSpeed", "av", "soundfile", "Slurm"):
        assert f"  {what}" in done.stdout
    assert "4 bits on" in done.stdout and "decodes h264, hevc, vp9, av1" in done.stdout


def test_what_is_broken_is_a_row(tmp_path):
    distribution(tmp_path, "torch", "2.0", "raise ImportError('libcudart.so.99: cannot open shared object file')")
    distribution(tmp_path, "bitsandbytes", "0.50", "import os; os.kill(os.getpid(), 11)")
    distribution(tmp_path, "transformers", "5.30", "raise SystemExit(3)")
    distribution(tmp_path, "flash_attn", "2.7", "import nothing_of_the_kind")
    distribution(tmp_path, "deepspeed", "0.20", "print('setting the accelerator'); __version__ = '0.20'")
    distribution(tmp_path, "torchaudio", "3.0")
    done = run("json=true", path=(tmp_path,), HF_TOKEN="hf_secret", WANDB_API_KEY="secret", WANDB_MODE="offline")
    assert done.returncode == 1
    rows = rows_of(done.stdout)
    assert {name for name, row in rows.items() if row["state"] == "missing"} == {
        "torch", "bitsandbytes", "transformers", "flash-attn", "DeepSpeed",
    }  # fmt: skip
    assert all(row["todo"] for row in rows.values() if row["state"] == "missing")
    assert "dies of SIGSEGV" in rows["bitsandbytes"]["found"] and "ends with code 3" in rows["transformers"]["found"]
    assert "libcudart.so.99" in rows["torch"]["found"] and "nothing_of_the_kind" in rows["flash-attn"]["found"]
    assert rows["av"]["state"] == rows["CPU"]["state"] == "ok"
    assert "with a token" in rows["hub"]["found"] and rows["W&B"]["found"] == "offline, logged in"
    assert "secret" not in done.stdout + done.stderr


def test_a_package_that_is_too_old_is_named(tmp_path):
    distribution(tmp_path, "peft", "0.1.0")
    rows = {row[0]: row for row in look("packages", tmp_path)}
    assert rows["peft"] == ["peft", "missing", "0.1.0; wanted is >=0.19", "pip install 'peft>=0.19'"]
    assert "packages" not in rows and "packages" in {row[0] for row in look("packages")}


def test_the_other_package_named_adapters_is_no_trouble(tmp_path):
    distribution(tmp_path, "adapters", "1.2.0")
    for path in ([tmp_path], [ROOT, tmp_path]):
        ((_, state, found, todo),) = look("adapters", *path)
        assert state == "ok" and "1.2.0" in found and not todo
    assert look("adapters") == []


def test_it_says_which_anymal_is_imported(tmp_path):
    ours = f"{anymal.__version__}, in {ROOT / 'anymal'}"
    distribution(tmp_path / "editable", "anymal", "0.0.9", package=False)
    origin = tmp_path / "editable" / "anymal-0.0.9.dist-info" / "direct_url.json"
    origin.write_text(json.dumps({"url": ROOT.as_uri(), "dir_info": {"editable": True}}))
    assert look("anymal", tmp_path / "editable") == [["anymal", "ok", f"{ours}, installed as an editable checkout", ""]]
    distribution(tmp_path / "site", "anymal", "0.0.9")
    (tmp_path / "checkout").mkdir()  # not the repository's root: an egg-info there would be an installation too
    (tmp_path / "checkout" / "anymal").symlink_to(ROOT / "anymal")
    ((_, state, found, todo),) = look("anymal", tmp_path / "checkout", tmp_path / "site")
    assert state == "note" and todo
    assert found == f"{ours}; what is installed (0.0.9) is in {tmp_path / 'site'}"


def test_half_a_package_is_a_row(tmp_path):
    (tmp_path / "torch-2.0.dist-info").mkdir()  # as an installation leaves it that was interrupted
    assert ["torch", "missing"] in [row[:2] for row in look("packages", tmp_path)]


def test_slurm_is_found_on_the_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert [row.state for row in examine.look("Slurm")] == ["note"]
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\necho slurm 24.05.3\n")
        (tmp_path / name).chmod(0o755)
    assert examine.look("Slurm") == [Row("Slurm", "ok", "slurm 24.05.3, not inside a job")]
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    (tmp_path / "srun").unlink()
    (row,) = examine.look("Slurm")
    assert row.state == "note" and "inside job 4711" in row.found and row.todo == "only sbatch is on PATH"
    (tmp_path / "sbatch").write_text("#!/bin/sh\nexit 1\n")
    (row,) = examine.look("Slurm")
    assert row.state == "note" and "returned non-zero" in row.found


def test_a_gpu_tool_without_a_driver_is_no_driver(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA-SMI has failed; exit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert examine.look("NVIDIA driver") == [Row("NVIDIA driver", "note", "none")]
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 580.95.05\necho 580.95.05\n")
    assert examine.look("NVIDIA driver") == [Row("NVIDIA driver", "ok", "580.95.05")]


def test_folders_are_told_with_their_file_system(monkeypatch):
    monkeypatch.setenv("ANYMAL_CACHE", "/dev/shm/not/yet/there")
    rows = {row.what: row for row in examine.look("disks")}
    assert "/dev/shm/not/yet/there" in rows["ANYMAL_CACHE"].found and "on tmpfs" in rows["ANYMAL_CACHE"].found
    monkeypatch.setenv("ANYMAL_CACHE", "/proc/not/there")
    (row,) = (row for row in examine.look("disks") if row.what == "ANYMAL_CACHE")
    assert row.state == "note" and "on proc" in row.found and row.todo


def test_it_needs_no_library_to_start_and_refuses_what_it_does_not_know():
    program = f"""if True:
        import sys; sys.path.insert(0, {str(ROOT)!r}); before = set(sys.modules)
        import anymal.doctor.examine
        print(*{{name.split(".")[0] for name in set(sys.modules) - before}} - sys.stdlib_module_names)
    """
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"anymal", "torchaudio"}, "of torchaudio at most a stand-in for a part of it"
    assert "json=true" in run("--help").stdout
    done = run("jsn=true")
    assert done.returncode == 2 and done.stderr.startswith("error: jsn=true: ")


@pytest.mark.parametrize(
    ("cuda", "driver", "todo"),
    [
        (
            "13.0",
            "550.54.15",
            "CUDA 13 wants driver 580 or later, this is 550: update the driver, or pip install --force-reinstall "
            "torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126",
        ),
        (
            "13.0",
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024",
            "CUDA 13 wants driver 580 or later, this is 535: ",
        ),
        ("13.0", "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release", "new enough for it"),
        ("12.6", "550.54.15", "is a GPU visible (nvidia-smi -L, CUDA_VISIBLE_DEVICES)?"),
        ("12.6", "470.256.02", "driver 470 is too old for any build of torch: install driver 580 or later"),
        (None, "580.95.05", "built without CUDA: pip install --force-reinstall torch==2.13.0 --index-url https://"),
        (None, "550.54.15", "torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126"),
        ("13.0", "no number", "install a build for a CUDA that it supports"),
    ],
)
def test_a_driver_that_torch_cannot_use_says_what_fits(cuda, driver, todo):
    assert todo in gpus.driver_remedy("2.13.0+cpu", cuda, driver)


CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
CUDA_12 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.mark.parametrize(
    ("cuda", "capability", "compiled", "todo"),
    [
        ("13.0", (9, 0), CUDA_13, ""),
        ("13.0", (8, 9), CUDA_13, ""),  # by what is for 8.6
        ("13.0", (8, 0), CUDA_13, ""),
        ("13.0", (7, 5), CUDA_13, "it has no bfloat16: it answers in float16, and trains with model.llm.bits=32 alone"),
        (
            "13.0",
            (7, 0),
            CUDA_13,
            "this torch (CUDA 13.0) has no kernels for it: pip install --force-reinstall torch==2.13.0 --index-url "
            "https://download.pytorch.org/whl/cu126 (driver 525 or later)",
        ),
        ("12.6", (7, 0), CUDA_12, "it has no bfloat16: it answers in float16, and not with model.llm.bits=8, and "),
        ("12.6", (12, 0), CUDA_12, "has no kernels for it: pip install --force-reinstall torch==2.13.0 --index-url "),
        ("12.6", (12, 0), [*CUDA_12, "compute_90"], ""),
        ("13.0", (9, 0), ["sm_90a"], ""),
    ],
)
def test_a_card_says_what_it_cannot_do(cuda, capability, compiled, todo):
    said = gpus.gpu_remedy("2.13.0", cuda, capability, compiled)
    assert todo in said and bool(todo) == bool(said)
