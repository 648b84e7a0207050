"""RMSNorm by one kernel: the same numbers, in the modules that it is the same in, and in no other."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import tiny_llms
from anymal.config.schema import LLMConfig, LoraConfig
from anymal.model import norms
from anymal.model.activation_checkpointing import set_checkpointing
from anymal.model.llm import add_lora, load_llm, set_frozen_mode

ALIKE = (LlamaRMSNorm, Olmo2RMSNorm, Qwen3RMSNorm, GptOssRMSNorm, T5LayerNorm, Gemma3RMSNorm, nn.RMSNorm)


class NoEps(LlamaRMSNorm):
    """Says that it has one, and does without."""

    def forward(self, hidden_states):
        return self.weight * F.rms_norm(hidden_states.float(), self.weight.shape, None, 0).to(hidden_states.dtype)


class Doubled(LlamaRMSNorm):
    """Named like one, and something else."""

    def forward(self, hidden_states):
        return 1.02 * super().forward(hidden_states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [8, 128, 4096])
@pytest.mark.parametrize("cls", ALIKE)
def test_norms_that_are_alike_are_found_by_their_numbers(cls, width, dtype):
    module = cls(width, eps=1e-5).to(dtype)
    before = copy.deepcopy(module)
    assert norms.fuse(module) == 1
    nn.init.normal_(module.weight, std=0.3)
    before.load_state_dict(module.state_dict())
    rows = torch.randn(2, 5, width).to(dtype)
    results = []
    for norm in (module, before):
        row = rows.clone().requires_grad_()
        out = norm(row)
        assert out.dtype == dtype
        results.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), [row, norm.weight])])
    for found, expected in zip(*results, strict=True):
        bound = max(8 * torch.finfo(dtype).eps, 1e-4)
        assert (found - expected).float().norm() <= bound * expected.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(4096, bias=False),
        nn.LayerNorm(64),
        CohereLayerNorm(4096),
        OlmoLayerNorm(64),
        MambaRMSNormGated(64, group_size=32),
        NoEps(64),
        Doubled(64),
        nn.BatchNorm1d(64),
        nn.GroupNorm(2, 64),
        nn.Linear(8, 8, bias=False),
        nn.PReLU(64),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_is_something_else_stays(module, dtype):
    module = copy.deepcopy(module).to(dtype)
    assert norms.fuse(module) == 0 and "forward" not in vars(module)


def test_it_is_the_instances_alone_and_can_be_undone():
    llm = tiny_llms.make("Llama")
    classes = [type(module) for module in llm.modules()]
    state = {name: tensor.clone() for name, tensor in llm.state_dict().items()}
    ids = torch.arange(7)[None]
    before = llm(ids).logits
    assert norms.fuse(llm) == 5 and norms.fuse(llm) == 0
    assert [type(module) for module in llm.modules()] == classes
    assert all(torch.equal(tensor, state[name]) for name, tensor in llm.state_dict().items())
    assert llm.state_dict().keys() == state.keys()
    torch.testing.assert_close(llm(ids).logits, before)
    norms.unfuse(llm)
    assert torch.equal(llm(ids).logits, before) and not any("forward" in vars(module) for module in llm.modules())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_reads_its_own_weight(again):
    module = LlamaRMSNorm(8)
    norms.fuse(module)
    other = again(module)
    nn.init.constant_(other.weight, 3.0)
    rows = torch.randn(4, 8)
    torch.testing.assert_close(other(rows), 3 * module(rows))


def test_weights_may_come_later():
    with torch.device("meta"):
        module = LlamaRMSNorm(8)
    assert norms.fuse(module) == 1
    module.to_empty(device="cpu")
    nn.init.constant_(module.weight, 2.0)
    assert module(torch.ones(1, 8)).tolist() == [pytest.approx([2.0] * 8)]


def test_a_weight_in_another_precision_is_the_classs_own_affair():
    """Of gpt-oss quantised: transformers keeps its norms in float32. torch would warn, and take its slow way."""
    module = GptOssRMSNorm(64)
    nn.init.normal_(module.weight)
    rows = torch.randn(3, 64).bfloat16()
    before = module(rows)
    norms.fuse(module)
    assert torch.equal(module(rows), before)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Qwen3"])
def test_llms_with_it_in_every_mode(name, mode):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**tiny_llms.SMALL, attn_implementation="eager")
    llm = getattr(transformers, f"{name}ForCausalLM")(config).requires_grad_(False)
    set_checkpointing(llm, mode)
    set_frozen_mode(llm, recompute=True)
    embeddings = torch.randn(1, 12, tiny_llms.WIDTH)

    def gradient() -> torch.Tensor:
        row = embeddings.clone().requires_grad_()
        return torch.autograd.grad(llm(inputs_embeds=row, use_cache=False).logits.square().mean(), row)[0]

    before = gradient()
    assert norms.fuse(llm) == {"Llama": 5, "Gemma2": 9, "Qwen3": 9}[name]  # Qwen3 has norms of queries and keys
    torch.testing.assert_close(gradient(), before, rtol=1e-3, atol=1e-5 * float(before.abs().max()))


def test_with_lora_the_norms_stay_frozen(tiny_llm):
    llm, _ = load_llm(LLMConfig(name=str(tiny_llm), bits=4, checkpointing="selective"), torch.device("cpu"))
    assert not any("forward" in vars(module) for module in llm.modules()), "nothing is replaced on a CPU"
    assert norms.fuse(llm) == 5
    llm = add_lora(llm, LoraConfig(rank=2))
    llm(torch.arange(7)[None]).logits.sum().backward()
    learnt = {name for name, parameter in llm.named_parameters() if parameter.grad is not None}
    assert learnt and all("lora_" in name for name in learnt)


def test_the_kernel_runs_outside_of_autocast(monkeypatch):
    """rms_norm is on the list of what autocast computes in float32 on a GPU: the row would be float32 from there on."""
    module = LlamaRMSNorm(8).to(torch.bfloat16)
    norms.fuse(module)
    kernel, seen = F.rms_norm, []

    def watched(*arguments, **more):
        seen.append(torch.is_autocast_enabled("cpu"))
        return kernel(*arguments, **more)

    monkeypatch.setattr(F, "rms_norm", watched)
    with torch.autocast("cpu", torch.bfloat16):
        module(torch.randn(2, 8).to(torch.bfloat16))
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False]
