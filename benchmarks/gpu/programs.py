"""The commands, end to end, on tiny models with random weights: train, stop, go on, finetune, evaluate, chat.

All that they need is made on the spot: an LLM with its tokenizer, a CLIP, tars of pictures with captions.
"""

import importlib.util
import io
import json
import random
import sys
import tarfile
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from gpu.measure import TINY_CLIP, Clock, Scale

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["red", "green", "blue", "white", "black", "round", "square", "small", "large", "bright"]
STEPS, SAVED = 6, 3


def run(scale: Scale, clock: Clock) -> dict[str, Any]:
    """The stage's figures: how many commands failed, and whether the run went on where it had stopped."""
    figures: dict[str, Any] = {"failed": 0}
    with tempfile.TemporaryDirectory() as name:
        given = settings(Path(name), words=8)

        def part(command: str, *words: str) -> None:
            clock.within(figures, command.replace(" ", "_"), 30, lambda: _note(figures, command, words))

        trained, tuned = f"{name}/pretrain", f"{name}/finetune"
        first = [*given, f"run.dir={trained}", f"run.save_every={SAVED}"]
        part("pretrain", *first, f"optim.steps={STEPS}")
        go_back(Path(trained))
        part("pretrain again", *first, f"optim.steps={STEPS}")
        figures["resumed"] = int(steps(Path(trained)) == [*range(1, STEPS + 1)])
        lora = ["model.lora.rank=4", f"model.checkpoint={trained}", f"run.dir={tuned}", "optim.steps=2"]
        part("finetune", *given, *lora)
        part("evaluate", f"checkpoint={tuned}", f"sets.held_out={name}/shards", "limit=4")
        (Path(name) / "a.png").write_bytes(picture(random.Random(0)))
        part("chat", f"checkpoint={tuned}", "max_new_tokens=8", "--image", f"{name}/a.png", "what is this?")
    return figures


def _note(figures: dict[str, Any], command: str, words: tuple[str, ...]) -> dict[str, Any]:
    code, said = start(command.split()[0], *words)
    if code:
        figures.setdefault("failures", {})[command] = said[-2000:]
    return {"failed": len(figures.get("failures", {}))}


def start(command: str, *words: str) -> tuple[int, str]:
    """``anymal COMMAND WORDS…`` in this process → its exit code, and what it said."""
    from anymal.launch import command as program

    said, before = io.StringIO(), sys.argv
    sys.argv = ["anymal", command, *words]
    try:
        with redirect_stdout(said), redirect_stderr(said):
            program.start()
        return 0, said.getvalue()
    except SystemExit as end:
        return int(end.code or 0), said.getvalue()
    except Exception as error:  # what a user would see as a traceback
        return 1, f"{said.getvalue()}\n{type(error).__name__}: {error}"
    finally:
        sys.argv = before


def settings(folder: Path, *, words: int) -> list[str]:
    """Overrides of a run on models and data that are made in `folder`; captions have so many `words`."""
    make_llm(folder / "llm")
    make_clip(folder / "clip")
    make_shards(folder / "shards", words)
    bits = 4 if importlib.util.find_spec("bitsandbytes") else 16
    given: dict[str, Any] = {
        "model.llm.name": folder / "llm",
        "model.llm.bits": bits,
        "model.modalities.image.encoder": folder / "clip",
        "model.modalities.image.projector.tokens": 4,
        "data.shards": folder / "shards",
        "data.batch_size": 4,
        "data.workers": 2,
        "optim.lr": 1e-3,
        "run.samples": 0,
    }
    return [f"{name}={value}" for name, value in given.items()]


def make_llm(folder: Path) -> None:
    """A Llama of four layers and a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([" ".join(WORDS), "system user assistant"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_clip(folder: Path) -> None:
    """A CLIP of two layers."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**TINY_CLIP)).save_pretrained(folder)
    size = TINY_CLIP["image_size"]
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": size}}
    processor |= {"crop_size": {"height": size, "width": size}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def make_shards(folder: Path, words: int) -> None:
    """Two tars of pictures with captions of so many words, and options beside them."""
    folder.mkdir(parents=True)
    chosen = random.Random(0)
    for shard in range(2):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for n in range(16):
                caption = " ".join(chosen.choice(WORDS) for _ in range(words))
                for suffix, content in (("png", picture(chosen)), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{shard}-{n:03d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def picture(chosen: random.Random) -> bytes:
    """A PNG of one colour."""
    from PIL import Image

    written = io.BytesIO()
    Image.new("RGB", (40, 40), tuple(chosen.randrange(256) for _ in range(3))).save(written, "PNG")
    return written.getvalue()


def go_back(run: Path) -> None:
    """Make the checkpoint of step `SAVED` the latest, as if the run had been killed before the next one."""
    link = run / "checkpoints" / "latest"
    if link.is_symlink():
        link.unlink()
        link.symlink_to(f"step-{SAVED:08d}")


def lines(run: Path) -> list[dict[str, Any]]:
    """Of a run's metrics.jsonl."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def steps(run: Path) -> list[int]:
    """The steps that were logged."""
    return [line["step"] for line in lines(run)]
