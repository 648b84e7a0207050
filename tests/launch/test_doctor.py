"""What `launch/doctor.py` says of this machine, and of one where much is broken; its libraries are real files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from anymal.launch import doctor
from small_runs import ROOT, environment


def run(*arguments: str, path: tuple[Path, ...] = (), **variables: str) -> subprocess.CompletedProcess:
    """The program, with folders before all others on its path."""
    env = environment() | variables | {"PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT]))}
    command = [sys.executable, str(ROOT / "launch" / "doctor.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)


def rows_of(said: str) -> dict[str, dict[str, str]]:
    return {row["what"]: row for row in json.loads(said)}


def distribution(folder: Path, name: str, version: str, code: str = "") -> Path:
    """A package as pip leaves it."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    (folder / f"{name}-{version}.dist-info").mkdir()
    (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    return folder


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
    rows = {row[0]: row for row in json.loads(run("look=packages", path=(tmp_path,)).stdout)}
    assert rows["peft"] == ["peft", "missing", "0.1.0; wanted is >=0.19", "pip install 'peft>=0.19'"]
    assert "packages" not in rows and "packages" in {row[0] for row in json.loads(run("look=packages").stdout)}


def test_the_other_package_named_adapters(tmp_path):
    distribution(tmp_path, "adapters", "1.2.0")
    ((_, state, found, todo),) = json.loads(run("look=adapters", path=(tmp_path,)).stdout)
    assert state == "note" and "1.2.0" in found and not todo
    ((_, state, *_),) = json.loads(run("look=adapters", path=(ROOT, tmp_path)).stdout)
    assert state == "note"
    assert json.loads(run("look=adapters").stdout) == []


def test_slurm_is_found_on_the_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert [row.state for row in doctor.look("Slurm")] == ["note"]
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\necho slurm 24.05.3\n")
        (tmp_path / name).chmod(0o755)
    assert doctor.look("Slurm") == [doctor.Row("Slurm", "ok", "slurm 24.05.3, not inside a job")]
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    (tmp_path / "srun").unlink()
    (row,) = doctor.look("Slurm")
    assert row.state == "note" and "inside job 4711" in row.found and row.todo == "only sbatch is on PATH"
    (tmp_path / "sbatch").write_text("#!/bin/sh\nexit 1\n")
    (row,) = doctor.look("Slurm")
    assert row.state == "note" and "returned non-zero" in row.found


def test_a_gpu_tool_without_a_driver_is_no_driver(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA-SMI has failed; exit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.look("NVIDIA driver") == [doctor.Row("NVIDIA driver", "note", "none")]
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 580.95.05\necho 580.95.05\n")
    assert doctor.look("NVIDIA driver") == [doctor.Row("NVIDIA driver", "ok", "580.95.05")]


def test_folders_are_told_with_their_file_system(monkeypatch):
    monkeypatch.setenv("ANYMAL_CACHE", "/dev/shm/not/yet/there")
    rows = {row.what: row for row in doctor.look("disks")}
    assert "/dev/shm/not/yet/there" in rows["ANYMAL_CACHE"].found and "on tmpfs" in rows["ANYMAL_CACHE"].found
    monkeypatch.setenv("ANYMAL_CACHE", "/proc/not/there")
    (row,) = (row for row in doctor.look("disks") if row.what == "ANYMAL_CACHE")
    assert row.state == "note" and "on proc" in row.found and row.todo


def test_it_needs_no_library_to_start_and_refuses_what_it_does_not_know():
    program = f"import sys; sys.path.insert(0, {str(ROOT / 'launch')!r}); before = set(sys.modules); import doctor\n"
    program += (
        "print(*{name.split('.')[0] for name in set(sys.modules) - before} - {'doctor'} - sys.stdlib_module_names)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
    assert "json=true" in run("--help").stdout
    done = run("jsn=true")
    assert done.returncode == 2 and done.stderr.startswith("error: jsn=true: ")
