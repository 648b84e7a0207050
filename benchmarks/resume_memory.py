"""What going on from a checkpoint takes of each rank's memory, where the LLM learns, beside a run that begins.

    make demo && .venv/bin/python benchmarks/resume_memory.py [CHECKOUT]

Two ranks under the DeepSpeed launcher train all of a random LLM of 40M parameters (the demo's tokenizer, encoder and
pictures; 16 bits, ZeRO 1), once from the start and once from the checkpoint of the first step. Its optimizer's file,
moments and float32 weights, has 480 MB. Resident memory (VmRSS, mapped pages of files included) of each rank:

- restore: the peak while weights and moments are put back, above what was there when that began and beyond the moments
  that the rank itself owns afterwards;
- after: what the rank holds after its next step, beyond what the run that began at the start does after its first.

The goal is the largest tensor, twice (and 5% of the file), for the one, and a tenth of the file for the other. CHECKOUT
is measured in place of this one, to see what an earlier version does.
"""

import ctypes
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS, RANKS = 2, 2
WIDTH, LAYERS = 256, 32
SHAPE = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": LAYERS, "tie_word_embeddings": True}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 4}
MB = 1e6


def status(key: str) -> float:
    """A line of this process's memory, such as VmRSS or its peak VmHWM, in MB."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / MB


def rank(folder: Path, given: list[str]) -> None:
    """One rank of a run; what it measured goes to FOLDER/RANK.json."""
    import anymal.training.engine
    import anymal.training.loop
    import anymal.training.run
    from anymal.adapters import REGISTRY
    from anymal.config.schema import Config
    from anymal.config.settings import load

    marks: dict[str, float] = {}

    def begin() -> None:
        marks["begun"] = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here

    def end(owned: float = 0) -> None:
        marks["restore"] = max(marks.get("restore", 0), status("VmHWM") - marks["begun"] - owned)

    def watch(module: Any, name: str, before: Any, after: Any) -> None:
        inner = getattr(module, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            before(*arguments)
            result = inner(*arguments, **named)
            after()
            return result

        setattr(module, name, watched)

    def nothing(*_: Any) -> None:
        pass

    def owned(engine: Any, *_: Any) -> None:
        pieces = [p for group in engine.optimizer.optimizer.param_groups for p in group["params"]]
        end(sum(2 * piece.nbytes for piece in pieces) / MB)

    def first_step() -> None:
        ctypes.CDLL(None).malloc_trim(0)  # what is free, but not given back yet, would be noise
        marks.setdefault("after", status("VmRSS"))

    run = anymal.training.run
    builds = run if hasattr(run, "build") else importlib.import_module("anymal.training.restore")  # since it has that
    watch(builds, "build", nothing, begin)
    watch(anymal.training.engine, "make_engine", lambda *_: end(), begin)
    watch(run, "train", owned, nothing)
    watch(anymal.training.loop, "step", nothing, first_step)
    run.run_stage(load(Config, None, given), REGISTRY)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(marks))


def make_llm(folder: Path, tokenizer: Path) -> None:
    """Random weights."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    words = AutoTokenizer.from_pretrained(tokenizer)
    words.save_pretrained(folder)
    torch.manual_seed(0)
    ends = {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **SHAPE, **ends)).save_pretrained(folder)


def start(checkout: Path, folder: Path, given: list[str]) -> list[dict[str, float]]:
    """Both ranks to their end; what each measured."""
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [launcher, "--num_gpus", RANKS, "--no_local_rank", __file__, "--rank", folder, *given]
    more = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
    env = os.environ | more | {"PATH": f"{launcher.parent}:{os.environ['PATH']}"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env, cwd=checkout, check=False)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(RANKS)]


def measure(checkout: Path, assets: Path, folder: Path) -> tuple[list[tuple[float, float]], float, float]:
    """Of each rank the two figures; the sizes of the optimizer's file and of its largest tensor; all in MB."""
    from safetensors import safe_open

    make_llm(folder / "llm", assets / "models" / "llm")
    given = {"model.llm.name": folder / "llm", "model.llm.bits": 16, "train": "[projectors,llm]"}
    given |= {"model.modalities.image.encoder": assets / "models" / "image", "data.workers": 0, "data.batch_size": 2}
    given |= {"model.modalities.image.projector.kind": "mlp", "model.modalities.image.projector.tokens": 4}
    given |= {"data.shards": assets / "data" / "image" / "train", "run.dir": folder / "run", "run.samples": 0}
    given |= {"optim.steps": STEPS, "run.save_every": STEPS - 1}
    settings = [f"{name}={value}" for name, value in given.items()]
    whole = start(checkout, folder, settings)
    latest = folder / "run" / "checkpoints" / "latest"
    latest.unlink()
    latest.symlink_to(f"step-{STEPS - 1:08d}")
    again = start(checkout, folder, settings)
    file = latest.resolve() / "training" / "optimizer.safetensors"
    with safe_open(file, "pt") as held:
        largest = max(held.get_tensor(name).nbytes for name in held.keys())  # noqa: SIM118  it is no dict
    figures = [(now["restore"], now["after"] - before["after"]) for now, before in zip(again, whole, strict=True)]
    return figures, file.stat().st_size / MB, largest / MB


def main() -> None:
    """Measure, and print a row for each rank and one line of figures."""
    from anymal.data_prep.demo.assets import cache_folder

    assets = cache_folder()
    if not (assets / "models" / "llm").is_dir():
        sys.exit("the demo's models are not there; run make demo first")
    checkout = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).resolve()
    with tempfile.TemporaryDirectory() as made:
        figures, file, largest = measure(checkout, assets, Path(made))
    print(f"optimizer's file {file:.0f} MB, its largest tensor {largest:.0f} MB")
    for number, (restore, after) in enumerate(figures):
        print(f"rank {number}: restore +{restore:.0f} MB, after a step {after:+.0f} MB")
    restore, after = (max(column) for column in zip(*figures, strict=True))
    met = restore <= 2 * largest + 0.05 * file and after <= 0.1 * file
    print(f"file_mb={file:.0f} restore_mb={restore:.0f} after_mb={after:.0f} goal={'met' if met else 'missed'}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
