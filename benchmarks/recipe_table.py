"""Every recipe beside the paper that it reproduces: tokens of a medium, projector, what learns, and two steps on a CPU.

    make demo && .venv/bin/python benchmarks/recipe_table.py
    .venv/bin/python benchmarks/recipe_table.py sphinx eagle-x4

For each stage of each recipe in launch/recipes:

- *tokens*: what a real medium of the demo (a square picture; a clip; a sound; five seconds of IMU) takes in the LLM,
  counted in a prepared sample, beside the paper's number.
- *parameters* of the projector at the real sizes of encoder and LLM, counted on tensors without data.
- *learns*: the parts in which parameters are trainable, from the parameters themselves.
- *loss*: before and after two optimizer steps on one batch, through narrow stand-ins of the encoders, with the same
  input and number of features (`benchmarks.stand_ins`), and the first four layers of the demo's LLM.

The goal is met where every count agrees, and every loss is finite and falls.
"""

import anymal  # noqa: F401  # isort: skip  (first: it prepares the process for torch)
import json
import math
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

from anymal.adapters import REGISTRY
from anymal.checkpoints.build import build, build_adapters
from anymal.config.command_line import run_program
from anymal.config.schema import Config
from anymal.config.stages import Recipe, config_of, load_untrained
from anymal.data.packing import pack
from anymal.data.prepare import Prepare
from anymal.data.quarantine import Quarantine
from anymal.data.stream import samples_once, unchanged
from anymal.data_prep.demo.assets import cache_folder
from anymal.errors import UserError
from anymal.model.fake_tensors import shapes_only
from anymal.model.multimodal import AnyMAL
from anymal.model.trainable import select_trainable, trainable
from anymal.sample import Message, Part, Sample
from stand_ins import replaced

RECIPES = Path(__file__).parent.parent / "launch" / "recipes"
PAPER: dict[str, dict[str, int]] = {
    "anymal-image": {"image": 64},
    "anymal-video": {"video": 32},
    "anymal-audio": {"audio": 32},
    "anymal-imu": {"imu": 32},
    "mmit-lora": {"image": 64, "video": 32, "audio": 32, "imu": 32},
    "eagle-x4": {"image": 1024},
    "sphinx": {"image": 1455},
    "mini-gemini": {"image": 576},
    "mini-gemini-hd": {"image": 2880},
    "x-instructblip-like": {"image": 32, "video": 32, "audio": 32, "imu": 32},
    "pandagpt-like": {"image": 1},
}
"""Tokens of a medium as the papers state them (sources in each recipe's head)."""
WIDTHS = {"Llama-3.1-8B-Instruct": 4096, "Llama-3.1-70B-Instruct": 8192, "Llama-2-7b-hf": 4096}
"""Of the embeddings of the LLMs that recipes name."""
GIVEN = ["data.shards=x", "model.checkpoint=null", "run.wandb=disabled"]
STEPS, LR, LAYERS = 2, 5e-6, 4  # AdamW's first steps move every weight by LR: small, or random networks overshoot
RATE = 50
"""Samples per second (Hz) of the IMU recordings that stand in for the recipes': the demo's."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A stage of a recipe."""

    recipe: str
    """Its name."""
    stage: str
    """Its stage, if it has several."""
    tokens: dict[str, int]
    """Tokens of a medium, by modality."""
    paper: dict[str, int]
    """The same as the paper has it."""
    parameters: int
    """Of the projectors, at real sizes."""
    learns: tuple[str, ...]
    """Parts with trainable parameters."""
    losses: tuple[float, float]
    """Before and after the steps."""

    @property
    def good(self) -> bool:
        """Whether counts agree and the loss falls."""
        counts = all(self.paper.get(kind) == count for kind, count in self.tokens.items())
        return counts and all(map(math.isfinite, self.losses)) and self.losses[1] < self.losses[0]


def recipes() -> list[str]:
    """Names of all recipes but the demo's."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith("demo"))


def stages(name: str) -> list[Recipe]:
    """The settings of each stage, encoders that an earlier stage leaves behind replaced by what they were made from."""
    found = load_untrained(Recipe, RECIPES / f"{name}.yaml", GIVEN)
    for stage in found:
        for modality in stage.model.modalities.values():
            if "rate" in modality.options:
                modality.options["rate"] = RATE
    return found


def _with_stand_ins(config: Config, folder: Path, *, narrow: bool) -> Config:
    modalities = {
        name: replace(modality, encoder=replaced(modality.encoder, folder, narrow=narrow))
        for name, modality in config.model.modalities.items()
    }
    return replace(config, model=replace(config.model, modalities=modalities))


def parameters(config: Config, folder: Path) -> int:
    """Of the projectors, between the real sizes of encoders and LLM."""
    real = _with_stand_ins(config, folder, narrow=False)
    width = WIDTHS[config.model.llm.name.rsplit("/", 1)[-1]]
    with shapes_only(FakeTensorMode(allow_non_fake_inputs=True)):
        adapters = build_adapters(REGISTRY, real.model.modalities, width)
    return sum(p.numel() for adapter in adapters.values() for p in adapter.projector.parameters())


def samples(prepare: Prepare, media: Mapping[str, bytes], kinds: list[str]) -> tuple[list, dict[str, int]]:
    """A prepared sample of each modality, and the tokens that its medium takes."""
    made, counts = [], {}
    for kind in kinds:
        turns = [
            Message(
                role="user", parts=[Part(kind=kind, content=media[kind]), Part(kind="text", content="What is it?")]
            ),
            Message(role="assistant", parts=[Part(kind="text", content="It is a test.")]),
        ]
        made.append(prepare(Sample(key=kind, shard="-", messages=turns)))
        counts[kind] = sum(length for _, _, length in made[-1].runs) + len(made[-1].skips)
    return made, counts


def learns(model: AnyMAL) -> tuple[str, ...]:
    """The parts of the model that hold trainable parameters."""
    found = set()
    for name in trainable(model):
        part = "lora" if "lora_" in name else name.split(".")[0]
        part = "encoders" if part == "trained_encoders" else part
        found.add(f"{part}.{name.split('.')[1]}" if part in ("projectors", "encoders") else part)
    return tuple(sorted(found))


def train(model: AnyMAL, tokens: list) -> tuple[float, float]:
    """The mean loss of a batch before and after `STEPS` steps of AdamW."""
    learner = torch.optim.AdamW(trainable(model).values(), lr=LR)
    batch = pack(tokens)

    def loss() -> torch.Tensor:
        return model(batch, model.encode(batch.media))[0] / len(batch.targets)

    losses = []
    for _ in range(STEPS):
        now = loss()
        losses.append(now.item())
        now.backward()
        learner.step()
        learner.zero_grad()
    with torch.no_grad():
        losses.append(loss().item())
    return losses[0], losses[-1]


def measure(name: str, stage: Recipe, *, llm: str, media: Mapping[str, bytes], folder: Path) -> Row:
    """One row of the table.

    Args:
        name: The recipe.
        stage: Its settings.
        llm: Folder of the LLM that takes the place of the recipe's.
        media: A medium of each modality, encoded.
        folder: Where stand-ins are kept.
    """
    config = config_of(stage)
    count = parameters(config, folder)
    config = _with_stand_ins(config, folder, narrow=True)
    bits = 32 if "llm" in config.train else config.model.llm.bits  # 16 bits would be many times slower on a CPU
    settings = replace(config.model.llm, name=llm, bits=bits, checkpointing="none")
    config = replace(config, model=replace(config.model, llm=settings))
    built = build(config, torch.device("cpu"), REGISTRY, train=config.train)
    select_trainable(built.model, config.train)
    tokens, counts = samples(built.prepare, media, list(config.model.modalities))
    base = name.removesuffix("-8b").removesuffix("-70b")
    return Row(
        recipe=name,
        stage=stage.stage,
        tokens=counts,
        paper={kind: PAPER[base].get(kind, 0) for kind in counts},
        parameters=count,
        learns=learns(built.model),
        losses=train(built.model, tokens),
    )


def demo_media(folder: Path) -> dict[str, bytes]:
    """The first medium of each modality of the demo's held-out data."""
    from anymal.config.schema import DataConfig

    found = {}
    for kind in ("image", "video", "audio", "imu"):
        quarantine = Quarantine(None, max_in_a_row=0, max_share=0)
        data = DataConfig(shards=str(folder / kind / "test"), workers=0)
        first = next(iter(samples_once(data, suffixes=REGISTRY.suffixes(), prepare=unchanged, quarantine=quarantine)))
        found[kind] = first.media()[0].content
    return found


def shallow(llm: Path, folder: Path) -> str:
    """The LLM with its first layers only, beside links to its files; return the folder."""
    made = folder / "llm"
    made.mkdir()
    for file in llm.iterdir():
        (made / file.name).symlink_to(file)
    (made / "config.json").unlink()
    config = json.loads((llm / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS}))
    return str(made)


def line(row: Row) -> str:
    """A row as text."""
    tokens = ", ".join(f"{kind} {count} / {row.paper[kind]}" for kind, count in row.tokens.items())
    return (
        f"{row.recipe + (' · ' + row.stage if row.stage else ''):<38} {tokens:<22} {row.parameters / 1e6:>8.1f} M  "
        f"{' '.join(row.learns):<42} {row.losses[0]:.3f} → {row.losses[1]:.3f}{'' if row.good else '  ✗'}"
    )


def main() -> None:
    """Print the table."""
    cache = cache_folder()
    if not (cache / "data" / "imu-encoder").is_dir():
        sys.exit("the demo's models are not there; run make demo first")
    asked = sys.argv[1:] or recipes()
    for name in asked:
        if name not in recipes():
            raise UserError(f"there is no recipe {name!r}; there are {', '.join(recipes())}")
    transformers.utils.logging.set_verbosity_error()  # the layers that are left out look like an error
    media, rows = demo_media(cache / "data"), []
    print(f"{'recipe · stage':<38} {'tokens / paper':<22} {'projector':>10}  {'learns':<42} loss")
    with tempfile.TemporaryDirectory() as folder:
        llm = shallow(cache / "models" / "llm", Path(folder))
        for name in asked:
            for stage in stages(name):
                rows.append(measure(name, stage, llm=llm, media=media, folder=Path(folder)))
                print(line(rows[-1]), flush=True)
    agree = sum(all(r.paper[kind] == count for kind, count in r.tokens.items()) for r in rows)
    print(f"stages={len(rows)} counts_agree={agree} goal={'met' if all(row.good for row in rows) else 'missed'}")


if __name__ == "__main__":
    run_program(main)
