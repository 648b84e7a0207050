"""The program behind `anymal mix`: two checkpoints or two LLMs → beta · a + (1 - beta) · b, tensor by tensor."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from anymal.checkpoints import checkpoint, checksums
from anymal.checkpoints.process import process_as_found
from anymal.config import settings
from anymal.config.command_line import parse_args
from anymal.errors import UserError
from anymal.files import whole_folder
from anymal.model.hub import license_of
from anymal.model.llm import read_config

NAMES = ("_name_or_path", "transformers_version")
"""What may differ between the configs of two LLMs."""
COPIED = ("*.json", "*.txt", "*.model", "*.jinja")
"""What an LLM's folder holds beside its weights, as far as it is no code."""
LORA_OWN = (
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights"),
    *("inference_mode", "base_model_name_or_path", "peft_version"),
)
"""What may differ between two LoRAs: the mix takes care of rank and scale, and the rest leaves the update as it is."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What is mixed."""

    a: str = MISSING
    """A run, a checkpoint, or a folder with an LLM (config.json and .safetensors)."""
    b: str = MISSING
    """Another of the same kind."""
    beta: float = 0.5
    """The share of a, from 0 (all b) to 1 (all a)."""
    out: str = MISSING
    """The folder that is written; there must be none yet."""
    model: dict[str, Any] = field(default_factory=dict)
    """Settings of the checkpoint's recipe to override, such as model.llm.name=FOLDER for an LLM that was moved, or
    model.modalities.NAME.encoder=FOLDER for an encoder."""

    def __post_init__(self):
        if not 0 <= self.beta <= 1:
            raise UserError(f"beta is {self.beta}; it is a share from 0 to 1")


def mixed(a: Tensor, b: Tensor, beta: float, name: str) -> Tensor:
    """beta · a + (1 - beta) · b, computed in float32 at least, in the dtype of both.

    Raises:
        UserError: Shapes or dtypes differ, or they are integers that do.
    """
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        raise UserError(f"{name} is {list(a.shape)} of {a.dtype} in a, and {list(b.shape)} of {b.dtype} in b")
    if torch.equal(a, b):
        return a  # to the bit: projectors know the weights of the encoders that they were trained on
    if not a.is_floating_point():
        raise UserError(f"{name} is of {a.dtype} and differs: only floating point can be mixed")
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide, copy=True).mul_(beta).add_(b.to(wide), alpha=1 - beta).to(a.dtype)


def require_alike(a: Mapping[str, Any], b: Mapping[str, Any], where: str) -> None:
    """Raises `UserError` with the first key at which two JSON objects differ, and both values."""
    for key in sorted({*a, *b}):
        if a.get(key) != b.get(key):
            raise UserError(f"{where}: {key} is {a.get(key)!r} in a and {b.get(key)!r} in b; they cannot be mixed")


def new_folder(out: str) -> Path:
    """Where the mix goes.

    Raises:
        UserError: It is there already.
    """
    if Path(out).exists():
        raise UserError(f"out={out} is there already")
    return Path(out)


def note(mix: Mix) -> str:
    """What the README.md of the result says of its making."""
    return (
        f"\n## A mix of two\n\nWeights = {mix.beta:g} · a + {1 - mix.beta:g} · b (`anymal mix`), with a from "
        f"`{mix.a}` and b from `{mix.b}`.\n"
    )


# ------------------------------------------------------------------------------------------------ two checkpoints


def mix_checkpoints(mix: Mix) -> None:
    """Write `mix.out` as a checkpoint that `anymal.checkpoints.checkpoint.existing` finds."""
    a, b = checkpoint.existing(mix.a), checkpoint.existing(mix.b)
    config = checkpoint.recipe(a, model=mix.model)
    modalities = [checkpoint.modalities_in(folder) for folder in (a, b)]
    require_alike(*({"modalities": names} for names in modalities), where="adapters")
    require_alike(*({"LoRA": (folder / "lora").is_dir()} for folder in (a, b)), where="checkpoints")
    with whole_folder(new_folder(mix.out)) as out:
        for name in modalities[0]:
            part = f"adapters/{name}"
            mix_projectors(a / part, b / part, out / part, mix.beta, moved(mix, name))
        if (a / "lora").is_dir():
            rank, alpha = mix_lora(config.model.llm.name, a / "lora", b / "lora", out / "lora", mix.beta)
            lora = replace(config.model.lora, rank=rank, alpha=alpha, rslora=False)
            config = replace(config, model=replace(config.model, lora=lora))
        for network in trained_networks(a, b):
            mix_llms(replace(mix, a=str(a / network), b=str(b / network), out=str(out / network)))
        settings.save(config, out / "recipe.yaml")
        shutil.copytree(a / "tokenizer", out / "tokenizer")
        (out / "README.md").write_text((a / "README.md").read_text() + note(mix))
        checksums.write(out)


def trained_networks(a: Path, b: Path) -> list[Path]:
    """The LLM and the encoders that two checkpoints hold because they were trained, as paths within them.

    Raises:
        UserError: They do not hold the same, or one is not in transformers' format.
    """
    networks, others = (
        {path.relative_to(folder) for path in [folder / "llm", *folder.glob("encoders/*")] if path.is_dir()}
        for folder in (a, b)
    )
    both = [{"trained networks": sorted(map(str, paths))} for paths in (networks, others)]
    require_alike(*both, where="checkpoints")
    for network in networks:
        if not (a / network / "config.json").is_file():
            raise UserError(f"{a / network} holds weights without a config.json; compositions cannot be mixed")
    return sorted(networks)


def moved(mix: Mix, modality: str) -> dict[str, Any]:
    """What an adapter_config.json is to say of LLM and encoder where `mix` names others than the checkpoints do."""
    names = {
        "llm": mix.model.get("llm", {}).get("name"),
        "encoder": mix.model.get("modalities", {}).get(modality, {}).get("encoder"),
    }
    return {key: name for key, name in names.items() if name is not None}


def mix_projectors(a: Path, b: Path, out: Path, beta: float, names: Mapping[str, Any]) -> None:
    """Mix the projectors of one modality, from ``adapters/MODALITY`` of two checkpoints into that of a third."""
    described = [json.loads((folder / "adapter_config.json").read_text()) | names for folder in (a, b)]
    if not all("llm_weights" in one for one in described):  # of an older checkpoint
        for one in described:
            one.pop("llm_weights", None)
    require_alike(*described, where=f"adapters/{a.name}")
    weights = [load_file(folder / "model.safetensors") for folder in (a, b)]
    require_alike(*({key: list(tensor.shape) for key, tensor in one.items()} for one in weights), where=str(a))
    out.mkdir(parents=True)
    (out / "adapter_config.json").write_text(json.dumps(described[0], indent=2))
    mix = {key: mixed(tensor, weights[1][key], beta, f"adapters/{a.name}: {key}") for key, tensor in weights[0].items()}
    save_file(mix, out / "model.safetensors")


def mix_lora(llm: str, a: Path, b: Path, out: Path, beta: float) -> tuple[int, float]:
    """Mix two LoRAs so that the update of every layer is the weighted sum of both updates.

    The matrices cannot be mixed one by one: (βA₁ + (1-β)A₂)(βB₁ + (1-β)B₂) has cross terms. PEFT's "cat" puts them side
    by side, which is exact at the price of the sum of both ranks; its "svd" would keep the rank and lose what does not
    fit into it.

    Returns:
        Rank and alpha of the result; alpha is the rank, since PEFT puts beta and both scales into the matrices, and
        those of rsLoRA too.
    """
    from peft import LoraConfig, LoraModel, PeftModel, get_peft_model_state_dict

    described = [json.loads((folder / "adapter_config.json").read_text()) for folder in (a, b)]
    kept = [
        {k: sorted(v) if isinstance(v, list) else v for k, v in one.items() if k not in LORA_OWN} for one in described
    ]
    require_alike(*kept, where="lora")
    for setting, key in (("dora", "use_dora"), ("modules_to_save", "modules_to_save")):
        if described[0].get(key):
            raise UserError(
                f"the LoRAs {a} and {b} were trained with model.lora.{setting}: what that makes of a layer is no sum "
                "of updates, so they cannot be mixed"
            )
    try:
        both = PeftModel.from_pretrained(hollow_llm(llm), str(a), adapter_name="a", torch_device="cpu")
        both.load_adapter(str(b), "b", torch_device="cpu")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the LoRAs {a} and {b} do not fit {llm}: {error}") from error
    assert isinstance(both.base_model, LoraModel)
    both.base_model.add_weighted_adapter(["a", "b"], [beta, 1 - beta], "mix", combination_type="cat")
    out.mkdir()
    weights = get_peft_model_state_dict(both, adapter_name="mix", save_embedding_layers=False)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, out / "adapter_model.safetensors")
    mix = both.peft_config["mix"]
    assert isinstance(mix, LoraConfig)
    mix.use_rslora = False  # as for alpha
    mix.save_pretrained(str(out))
    return mix.r, float(mix.lora_alpha)


def hollow_llm(name: str) -> nn.Module:
    """The LLM's modules with their shapes, without its weights: each is a single zero, expanded. PEFT needs no more.

    Not on meta tensors: PEFT would drop the LoRA's values as well.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(read_config(name), dtype=torch.float32, trust_remote_code=False)
    for module in llm.modules():
        for key, weight in list(module.named_parameters(recurse=False)):
            module.register_parameter(key, nn.Parameter(torch.zeros(()).expand(weight.shape), requires_grad=False))
    return llm


# ------------------------------------------------------------------------------------------------- two whole LLMs


def mix_llms(mix: Mix) -> None:
    """Write `mix.out` as an LLM's folder, with the shards and all other files of a."""
    a, b = Path(mix.a), Path(mix.b)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (a, b)]
    require_alike(*({k: v for k, v in one.items() if k not in NAMES} for one in configs), where="config.json")
    if "quantization_config" in configs[0]:
        raise UserError(f"{a} is quantised (quantization_config in config.json): mix the LLMs it was made from")
    in_a, in_b = weight_map(a), weight_map(b)
    require_alike(*(dict.fromkeys(names, "there") for names in (in_a, in_b)), where="tensors")
    with whole_folder(new_folder(mix.out)) as out, contextlib.ExitStack() as stack:
        theirs = {path: stack.enter_context(safe_open(path, "pt")) for path in set(in_b.values())}
        bar = stack.enter_context(tqdm(total=len(in_a), unit="tensor", desc="mix", disable=None))
        for shard in sorted(set(in_a.values())):
            with shard_like(shard, out / shard.name) as (names, write), safe_open(shard, "pt") as ours:
                for name in names:
                    write(mixed(ours.get_tensor(name), theirs[in_b[name]].get_tensor(name), mix.beta, name))
                    bar.update()
        for path in {path for pattern in COPIED for path in a.glob(pattern)}:
            shutil.copy(path, out)
        licenses = {license_of(str(folder)) for folder in (a, b)}
        head = f"---\nlicense: {licenses.pop()}\n---\n" if len(licenses) == 1 else ""
        (out / "README.md").write_text(f"{head}# {Path(mix.out).name}\n{note(mix)}")


def weight_map(folder: Path) -> dict[str, Path]:
    """Which file of an LLM's folder holds each tensor.

    Raises:
        UserError: There are no .safetensors, one of those that the index names is missing, or one is damaged.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = {single.name}
    if index.is_file():
        files = set(json.loads(index.read_text())["weight_map"].values())
    files_of: dict[str, Path] = {}
    for file in sorted(files):
        path = folder / Path(file).name
        if not path.is_file():
            raise UserError(f"{folder} lacks {file}: its weights are not all there, or not in .safetensors")
        try:
            with safe_open(path, "pt") as tensors:
                files_of |= dict.fromkeys(tensors.keys(), path)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged: {error}") from error
    return files_of


@contextlib.contextmanager
def shard_like(model: Path, out: Path) -> Iterator[tuple[list[str], Callable[[Tensor], None]]]:
    """Write a .safetensors with the header of another, tensor by tensor: the library writes whole files from memory.

    The format is eight bytes with the header's length, the header (JSON), and the tensors' bytes in its order.

    Returns:
        The tensors' names in the order in which they are to be written, and the function that writes one.
    """
    with model.open("rb") as source, out.open("wb") as file:
        length = source.read(8)
        header = source.read(int.from_bytes(length, "little"))
        file.write(length + header)
        offsets = {name: entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"}

        def write(tensor: Tensor) -> None:
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

        yield sorted(offsets, key=offsets.__getitem__), write


@process_as_found()
def main(usage: str) -> None:
    """Read the command line, and mix checkpoints or LLMs."""
    mix = parse_args(Mix, usage)
    are_llms = [(Path(folder) / "config.json").is_file() for folder in (mix.a, mix.b)]
    if are_llms[0] != are_llms[1]:
        one, other = (mix.a, mix.b) if are_llms[0] else (mix.b, mix.a)
        raise UserError(f"{one} is an LLM (it has a config.json) and {other} is none; they cannot be mixed")
    (mix_llms if all(are_llms) else mix_checkpoints)(mix)
    print(f"{mix.out}: {mix.beta:g} · {mix.a} + {1 - mix.beta:g} · {mix.b}")
