"""``run.deterministic``: what it sets and sets back, and that a step needs nothing that a GPU could not do so."""

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from anymal.adapters.pooling import pool_map, pool_sequence
from anymal.errors import UserError
from anymal.training.determinism import CUBLAS, deterministic
from small_runs import go_back, losses, make_encoders, pretrain_here, settings, write_pairs

NAMES = """adaptive_max_pool2d_backward adaptive_max_pool3d_backward _adaptive_avg_pool2d_backward
_adaptive_avg_pool3d_backward avg_pool3d_backward _ctc_loss_backward _embedding_bag_backward
fractional_max_pool2d_backward fractional_max_pool3d_backward grid_sampler_2d_backward grid_sampler_3d_backward histc
max_pool3d_with_indices_backward max_unpool2d max_unpool3d median nanmedian kthvalue bincount nll_loss2d_forward
nll_loss2d_backward put put_ reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward
replication_pad1d_backward replication_pad2d_backward replication_pad3d_backward roi_align_backward
upsample_linear1d_backward upsample_bilinear2d_backward _upsample_bilinear2d_aa_backward upsample_bicubic2d_backward
_upsample_bicubic2d_aa_backward upsample_trilinear3d_backward
_scaled_dot_product_cudnn_attention_backward _scaled_dot_product_fused_attention_overrideable_backward"""
WITHOUT = frozenset(NAMES.split())
"""Operations of torch that have no form with a fixed order on CUDA (the docstring of
``torch.use_deterministic_algorithms``, by their names beneath ``torch.nn``). ``cumsum`` has none of fractions."""


class Operations(TorchDispatchMode):
    """Notes what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        whole = any(isinstance(arg, torch.Tensor) and not arg.is_floating_point() for arg in args)
        self.names |= {name} if name != "cumsum" or not whole else set()
        return func(*args, **kwargs or {})

    def refused(self) -> set[str]:
        """Those that CUDA cannot do in a fixed order."""
        return self.names & {*WITHOUT, "cumsum"}


def state() -> list[object]:
    return [
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.utils.deterministic.fill_uninitialized_memory,
        os.environ.get(CUBLAS),
    ]


def test_what_is_set_is_set_back(monkeypatch):
    monkeypatch.delenv(CUBLAS, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = state()
    with deterministic(False):
        assert state() == before
    with pytest.raises(ZeroDivisionError), deterministic(True):
        assert state() == [True, True, False, False, ":4096:8"]
        _ = 1 / 0
    assert state() == before


def test_a_workspace_that_cublas_cannot_use_for_it_is_refused(monkeypatch):
    monkeypatch.setenv(CUBLAS, ":16:8")
    with deterministic(True):
        assert os.environ[CUBLAS] == ":16:8"
    monkeypatch.setenv(CUBLAS, ":0:0")
    with (
        pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG to be :4096:8 or :16:8, not :0:0"),
        deterministic(True),
    ):
        pass


@pytest.fixture(scope="module")
def given(tiny_llm, tmp_path_factory):
    """Overrides of a run, given its folder."""
    folder, kinds = tmp_path_factory.mktemp("given"), ["image", "imu"]
    encoders, pairs = make_encoders(folder / "encoders"), write_pairs(folder / "pairs", kinds)
    return lambda run, **more: settings(tiny_llm, encoders, run, pairs, kinds, **{"optim__steps": 2} | more)


@pytest.mark.parametrize("kind", ["mlp", "resampler", "qformer", "abstractor", "cross_attention"])
def test_a_step_does_nothing_that_a_gpu_cannot_do_in_a_fixed_order(given, tmp_path, kind):
    overrides = given(tmp_path, run__deterministic=True, optim__steps=1, model__lora__rank=4)
    train = "projectors,lora,encoders.imu" if kind == "mlp" else "projectors,lora"  # then what mlp pools has a gradient
    overrides += [f"model.modalities.image.projector.kind={kind}", f"train=[{train}]"]
    overrides += ["model.modalities.image.projector.options.every=1"] * (kind == "cross_attention")
    with Operations() as done:
        pretrain_here(None, *overrides)
    assert {"mm", "native_layer_norm_backward", "_foreach_add_"} & done.names
    assert not done.refused()


def test_the_check_sees_what_would_be_refused():
    maps = torch.randn(2, 3, 5, 5, requires_grad=True)
    with Operations() as done:
        torch.nn.functional.adaptive_avg_pool2d(maps, 2).sum().backward()
        torch.arange(3).cumsum(0)
    assert done.refused() == {"_adaptive_avg_pool2d_backward"}


@pytest.mark.parametrize(("size", "side"), [(6, 3), (5, 2), (7, 7), (3, 1)])
def test_pooling_by_products_is_pooling(size, side):
    maps = torch.randn(2, 3, size, size)
    with deterministic(True):
        torch.testing.assert_close(pool_map(maps, side), torch.nn.functional.adaptive_avg_pool2d(maps, side))
        rows = pool_sequence(maps[:, 0], side)
        torch.testing.assert_close(rows, torch.nn.functional.adaptive_avg_pool1d(maps[:, 0].mT, side).mT)


def test_on_a_cpu_it_changes_no_loss_but_by_rounding_and_a_run_goes_on_to_the_bit(given, tmp_path):
    pretrain_here(None, *given(tmp_path / "free", optim__steps=3))
    fixed = given(tmp_path / "fixed", optim__steps=3, run__deterministic=True, run__save_every=1)
    pretrain_here(None, *fixed)
    whole = losses(tmp_path / "fixed")
    assert whole == pytest.approx(losses(tmp_path / "free"), rel=1e-5)
    go_back(tmp_path / "fixed", 1)
    pretrain_here(None, *fixed)
    assert losses(tmp_path / "fixed") == whole
