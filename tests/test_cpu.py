"""A machine without a GPU: torchaudio imports beside a CPU torch, and OpenMP's threads do not spin."""

import os
import subprocess
import sys
import types

import pytest

from anymal import cpu


def versions(monkeypatch, **found):
    monkeypatch.setattr(cpu.importlib.metadata, "version", lambda name: found[name])
    for name in ("torchaudio", "torchaudio._extension"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize(
    ("torch", "torchaudio", "needed"),
    [("2.13.0+cpu", "2.11.0", True), ("2.13.0", "2.11.0", False), ("2.13.0+cpu", "2.13.0+cpu", False)],
)
def test_the_stand_in_is_used_only_where_the_extension_cannot_load(monkeypatch, torch, torchaudio, needed):
    versions(monkeypatch, torch=torch, torchaudio=torchaudio)
    assert cpu.make_torchaudio_importable() is needed
    assert ("torchaudio._extension" in sys.modules) is needed
    sys.modules.pop("torchaudio._extension", None)


def test_a_torchaudio_that_works_already_is_left_alone(monkeypatch):
    versions(monkeypatch, torch="2.13.0+cpu", torchaudio="2.11.0")
    monkeypatch.setitem(sys.modules, "torchaudio", types.ModuleType("torchaudio"))
    assert cpu.make_torchaudio_importable() is False


def test_torchaudio_and_transformers_import_and_compute():
    program = """
import anymal
import torchaudio, torch, os
from transformers import AutoModelForCausalLM
mel = torchaudio.transforms.MelSpectrogram(16000)(torch.randn(1, 16000))
slower = torchaudio.functional.resample(torch.randn(1, 48000), 48000, 16000)
print(tuple(mel.shape), tuple(slower.shape), os.environ["OMP_WAIT_POLICY"])
"""
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.split("\n")[0] == "(1, 128, 81) (1, 16000) passive"
