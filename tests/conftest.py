"""What several tests need: a tiny causal LM of transformers with a chat template, made on the spot."""

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import anymal  # noqa: F401  (makes torchaudio importable before transformers)
from anymal.launch import command

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # the suite runs in two processes, for as many cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that in the end no process is left alone with them."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_llm(folder: Path, *, width: int = 64, layers: int = 2, seed: int = 0) -> Path:
    """A random-weight Llama and a byte-level tokenizer, saved as any model folder is."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["a red apple on the table", "system user assistant", "what is this? it is a dog"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory) -> Path:
    """The folder of a tiny causal LM."""
    return make_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Ends a test that waits for a pipe."""

    def ended(*_):
        raise AssertionError("waits for ever")

    before = signal.signal(signal.SIGALRM, ended)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def run_command(monkeypatch) -> Iterator[Callable[..., int]]:
    """``anymal WORDS…`` in this process → its exit code: without the seconds that the imports of another would take."""

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["anymal", *map(str, words)])
        try:
            command.start()
        except SystemExit as end:
            return end.code or 0
        return 0

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield run
    for number, handler in before.items():
        signal.signal(number, handler)
