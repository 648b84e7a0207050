"""What would make a GPU wait for the host, seen without one."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anymal.adapters import REGISTRY
from anymal.config.schema import Config
from anymal.config.settings import load
from anymal.data.packing import Item, Row, pack
from anymal.model import norms, precision
from anymal.model.activation_checkpointing import set_checkpointing
from anymal.model.multimodal import AnyMAL
from anymal.model.trainable import select_trainable
from anymal.training import loop
from anymal.training.run import run_stage
from host_reads import HostReads, watched
from small_runs import make_encoders, settings, write_pairs
from toys import medium, sample, text, toy_model

KINDS = ["image", "imu"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> Path:
    return make_encoders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("pairs"), KINDS)


@pytest.mark.parametrize(
    "more",
    [
        {"engine__zero": 0},
        {"model__llm__bits": 8, "model__llm__checkpointing": "selective"},
        {"train": "[projectors,lora]", "model__lora__dropout": 0.1, "model__llm__checkpointing": "full"},
        {"train": "[projectors,encoders]", "engine__zero": 2},
    ],
    ids=["zero 0", "8 bits", "LoRA", "encoders learn"],
)
def test_the_host_reads_nothing_from_the_forward_pass_to_the_optimizer(tiny_llm, encoders, shards, tmp_path, more):
    given = {"optim__steps": 2, "optim__gradient_accumulation": 2, "data__workers": 1} | more
    arguments = settings(tiny_llm, encoders, tmp_path, shards, KINDS, **given)
    with watched() as watch:
        run_stage(load(Config, None, arguments, ["train=[projectors]"]), REGISTRY)
    assert watch.seen["mm"] >= 50 and not watch.found, watch.found


def test_host_reads_are_noticed(tiny_llm, encoders, shards, tmp_path, monkeypatch):
    def peeks(total: Tensor, answers: int, world: int) -> Tensor:
        assert torch.isfinite(total)
        return total.new_tensor(world / answers)

    monkeypatch.setattr(loop, "scale_of", peeks)
    arguments = settings(tiny_llm, encoders, tmp_path, shards, KINDS, optim__steps=1, data__workers=1)
    with watched() as watch:
        run_stage(load(Config, None, arguments, ["train=[projectors]"]), REGISTRY)
    (place,) = watch.found
    assert "test_waiting.py" in place and "isfinite(total)" in place
    x = torch.arange(4.0)
    with HostReads() as mode:
        assert len(x[x > 1]) == 2 and x.sum() == 6 and len(torch.nonzero(x)) == 3
        x[x > 1] = 0
    assert {place.split()[0] for place in mode.found} >= {"index", "_local_scalar_dense", "nonzero", "index_put_"}


@pytest.mark.parametrize("zero", [0, 1])
def test_deepspeed_does_not_wait_for_the_device(tiny_llm, encoders, shards, tmp_path, monkeypatch, zero):
    """Its throughput timer did, twice a micro-batch from the third step on: no operation that is seen above."""
    waited: list[int] = []
    monkeypatch.setattr(type(get_accelerator()), "synchronize", lambda *_: waited.append(1))
    counted = []
    monkeypatch.setattr(loop, "step", lambda engine, step=loop.step: (step(engine), counted.append(len(waited)))[0])
    more = {"optim__steps": 5, "optim__gradient_accumulation": 2, "data__workers": 1, "engine__zero": zero}
    run_stage(load(Config, None, settings(tiny_llm, encoders, tmp_path, shards, KINDS, **more)), REGISTRY)
    assert len(counted) == 10 and counted[-1] == counted[0]


class Copies(TorchDispatchMode):
    """Notes what is copied from the host to where the model is, or the other way, within a step."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor) and leaf.ndim]
        if len({tensor.device.type for tensor in tensors}) > 1:
            self.found.append(str(func))
        return out


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_step_needs_neither_numbers_nor_copies(tiny_llm, checkpointing, monkeypatch):
    """The model is on the meta device, where there are shapes alone: reading a number, or copying one, is an error."""
    monkeypatch.setattr(AnyMAL, "autocast", lambda _: nullcontext())  # torch has none for shapes
    model, prompt = toy_model(tiny_llm, eye=3, ear=2)
    asked = [[medium("eye", 1.0), text("what?")], [text("who?")], [medium("eye", 2.0), medium("ear", 3.0)]]
    batch = pack([prompt.sample(sample(*parts)) for parts in asked])
    model = AnyMAL(model.llm.to("meta"), model.adapters)
    set_checkpointing(model.llm, checkpointing)
    select_trainable(model, ["projectors"])
    assert model.device.type == "meta"
    moved = batch.to(model.device)
    with Copies() as copies:
        total, per_group = model(moved, model.encode(moved.media))
        total.backward()
    assert per_group.shape == (len(batch.groups), 2) and not copies.found
    assert all(p.grad is not None for p in model.projectors.parameters())
    with pytest.raises((RuntimeError, NotImplementedError)):
        total.item()


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch was built without CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: benchmarks/gpu_check.py tries the real thing")
def test_a_forward_pass_runs_on_a_gpus_tensors_without_data(tiny_llm, monkeypatch):
    """What a build of torch for CUDA allows without a GPU: shapes and devices of all kernels, and no number read."""
    monkeypatch.setattr(precision, "hardware", lambda device: precision.Hardware(kind="cuda", capability=(9, 0)))
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(nn.Module, "to", lambda module, *_: module)  # they are there; torch cannot exchange fake ones
    model, prompt = toy_model(tiny_llm, bits=16, eye=3, ear=2)
    assert norms.fuse(model.llm) > 0
    asked = [[medium("eye", 1.0), text("what?")], [text("who?")], [medium("eye", 2.0), medium("ear", 3.0)]]
    row = Row(items=[Item(position=0, dataset="", tokens=prompt.sample(sample(*parts))) for parts in asked])
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        batch = row.collate(pinned=True)
        for module in [model.llm, *model.encoders.values(), *model.projectors.values()]:
            _on_fake_gpu(module)
        model = AnyMAL(model.llm, model.adapters)
        assert model.device.type == "cuda"
        moved = batch.to(model.device)
        with HostReads() as watch, Copies() as copies:
            total, per_group = model(moved, model.encode(moved.media))
    assert total.device.type == "cuda" and per_group.shape == (len(batch.groups), 2)
    assert watch.seen["_varlen_attn"] == model.llm.config.num_hidden_layers and not watch.found and not copies.found


def _on_fake_gpu(module: nn.Module) -> None:
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
                part._parameters[name] = nn.Parameter(empty, requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
