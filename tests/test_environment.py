"""What is set before the heavy libraries: torchaudio imports beside a CPU torch, threads do not spin, cuDNN waits, a
GPU's segments grow."""

import importlib.metadata
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from anymal import environment
from small_runs import ROOT


def versions(monkeypatch, **found):
    monkeypatch.setattr(environment.importlib.metadata, "version", lambda name: found[name])
    for name in ("torchaudio", "torchaudio._extension"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize(
    ("torch", "torchaudio", "needed"),
    [
        ("2.13.0+cpu", "2.11.0", True),
        ("2.13.0+cu126", "2.11.0", True),
        ("2.13.0", "2.11.0", False),
        ("2.13.0+cpu", "2.13.0+cpu", False),
    ],
)
def test_the_stand_in_is_used_only_where_the_extension_cannot_load(monkeypatch, torch, torchaudio, needed):
    versions(monkeypatch, torch=torch, torchaudio=torchaudio)
    assert environment.make_torchaudio_importable() is needed
    assert ("torchaudio._extension" in sys.modules) is needed
    sys.modules.pop("torchaudio._extension", None)


def test_a_torchaudio_that_works_already_is_left_alone(monkeypatch):
    versions(monkeypatch, torch="2.13.0+cpu", torchaudio="2.11.0")
    monkeypatch.setitem(sys.modules, "torchaudio", types.ModuleType("torchaudio"))
    assert environment.make_torchaudio_importable() is False


def test_torchaudio_and_transformers_import_and_compute():
    program = """
import anymal
import torchaudio, torch, os
from transformers import AutoModelForCausalLM
mel = torchaudio.transforms.MelSpectrogram(16000)(torch.randn(1, 16000))
slower = torchaudio.functional.resample(torch.randn(1, 48000), 48000, 16000)
print(tuple(mel.shape), tuple(slower.shape), *[os.environ[name] for name in %r])
"""
    ours = ["OMP_WAIT_POLICY", "TORCH_CUDNN_SDPA_DEPRIORITIZED"]
    env = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run([sys.executable, "-c", program % ours], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.split("\n")[0] == "(1, 128, 81) (1, 16000) passive 1"


@pytest.mark.parametrize(
    ("set_here", "name"),
    [("make_threads_yield", "OMP_WAIT_POLICY"), ("put_cudnn_attention_last", "TORCH_CUDNN_SDPA_DEPRIORITIZED")],
)
def test_what_the_user_set_stays(monkeypatch, set_here, name):
    monkeypatch.setenv(name, "0")
    getattr(environment, set_here)()
    assert os.environ[name] == "0"


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
    ],
)
def test_segments_grow_unless_the_environment_says_otherwise(given, read):
    program = "import anymal, torch; print(torch._C._accelerator_getAllocatorSettings())"
    env = {name: value for name, value in os.environ.items() if name not in environment.ALLOCATOR_SETTINGS} | given
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.split("\n")[0] == read


def torchaudio_as_installed(folder: Path) -> Path:
    """A folder for PYTHONPATH that holds this environment's torchaudio, and an extension that cannot be loaded."""
    package = Path(importlib.metadata.distribution("torchaudio").locate_file("torchaudio"))
    for path in [*package.iterdir(), *package.parent.glob("torchaudio-*.dist-info")]:
        there = folder / path.relative_to(package.parent)
        there.parent.mkdir(parents=True, exist_ok=True)
        if path.name == "lib":
            there.mkdir()
        else:
            there.symlink_to(path)
    extension = folder / "torchaudio" / "lib" / "_torchaudio.abi3.so"
    extension.write_bytes(b"this is for CUDA")
    return extension


@pytest.mark.skipif(not environment.versions_differ(), reason="torchaudio is built for this torch")
def test_make_install_leaves_an_environment_in_which_other_peoples_programs_work(tmp_path):
    extension = torchaudio_as_installed(tmp_path)
    # not the imports of this process, and the environment's packages, our own included, only behind the folder
    env = os.environ | {"PYTHONPATH": str(tmp_path)}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(arguments, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)

    theirs = [sys.executable, "-c", "from transformers import LlamaForCausalLM; import torchaudio.compliance.kaldi"]
    assert "Could not load this library" in run(sys.executable, "-c", "import torchaudio").stderr
    dry = subprocess.run(["make", "-n", "-B", "install"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    (ours,) = [line.split()[1:] for line in dry.splitlines() if line.endswith(".py")]
    done = run(sys.executable, *[str(ROOT / word) for word in ours])
    assert done.stdout.startswith(f"removed {extension}: it is for CUDA") and not extension.exists(), done.stderr
    assert run(sys.executable, str(ROOT / ours[0])).stdout == "", "a second time there is nothing to do"
    done = run(*theirs)
    assert done.returncode == 0, done.stderr


def test_what_is_swapped_comes_back():
    class Base:
        def speak(self) -> str:
            return "base"

    class Child(Base):
        pass

    one, other = Child(), Child()
    other.speak = lambda: "its own"
    for owner, before in ((one, "base"), (other, "its own")):
        held = dict(vars(owner))
        with pytest.raises(KeyError), environment.swapped(owner, "speak", lambda: "new"):
            assert owner.speak() == "new"
            raise KeyError
        assert owner.speak() == before and vars(owner) == held
    with environment.swapped(Base, "speak", lambda _: "new"):
        assert one.speak() == "new"
    assert one.speak() == "base"
