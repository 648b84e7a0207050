"""Which parameters learn at which rate, and when: groups, schedules, and that neither changes how a run resumes."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from anymal.config.schema import Config, OptimConfig
from anymal.config.settings import load
from anymal.errors import UserError
from anymal.model.trainable import select_trainable, trainable
from anymal.training.engine import engine_of, processes
from anymal.training.optimizer import learning_rate, make_optimizer, parameter_groups, set_learning_rate
from anymal.training.optimizer_state import full_moments, restore_moments
from anymal.training.resume import compare
from small_runs import go_back, losses, make_encoders, metrics, pretrain_here, settings, write_pairs
from toys import toy_model

NAMED = ["model.llm.name=x", "model.modalities.image.encoder=e", "model.modalities.audio.encoder=e"]
STEPS = 40


def optim(*overrides: str) -> OptimConfig:
    return load(Config, None, [*NAMED, *overrides]).optim


# --------------------------------------------------------------------------------------------------- schedules


def of_transformers(name: str, optim: OptimConfig, warmup: int, **more: float) -> list[float]:
    """The rates of each step by transformers' own scheduler."""
    from transformers import get_scheduler

    weight = nn.Parameter(torch.zeros(1))
    learner = torch.optim.AdamW([weight], lr=optim.lr)
    schedule = get_scheduler(name, learner, warmup, optim.steps, scheduler_specific_kwargs=more or None)
    rates = []
    for _ in range(optim.steps):
        rates.append(learner.param_groups[0]["lr"])
        learner.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 7, STEPS])
@pytest.mark.parametrize(
    ("schedule", "theirs", "more"),
    [
        ("cosine", "cosine", {}),
        ("linear", "linear", {}),
        ("constant", "constant_with_warmup", {}),
        ("cosine", "cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ],
)
def test_the_schedules_are_those_of_transformers_but_for_a_warm_up_that_begins_a_step_ahead(
    schedule, theirs, more, warmup
):
    extra = [f"optim.{key}={value}" for key, value in more.items()]
    ours = optim(f"optim.steps={STEPS}", f"optim.schedule={schedule}", f"optim.warmup_steps={warmup}", *extra)
    rates = [learning_rate(step, ours) for step in range(STEPS)]
    reference = of_transformers(theirs, ours, warmup, **more)
    assert rates[warmup:] == pytest.approx(reference[warmup:], rel=1e-12)
    assert rates[: max(0, warmup - 1)] == pytest.approx(reference[1:warmup], rel=1e-12)
    assert rates[0] > 0


def test_a_line_ends_where_it_is_told_to():
    line = optim("optim.lr=1", "optim.steps=10", "optim.warmup=0", "optim.schedule=linear", "optim.min_lr_rate=0.25")
    assert learning_rate(10, line) == 0.25 and learning_rate(1, line) == 1


def test_the_default_schedule_is_to_the_bit_what_it_always_was():
    for peak, warmup, steps in ((2e-4, 0.03, 1000), (1e-3, 0, 37), (3e-5, 0.5, 99), (0.1, 1.0, 10)):
        config = optim(f"optim.lr={peak}", f"optim.warmup={warmup}", f"optim.steps={steps}")
        rising = max(1, round(warmup * steps))
        for step in range(steps):
            progress = (step - rising) / max(1, steps - rising)
            then = peak * (step + 1) / rising if step < rising else peak * 0.5 * (1 + math.cos(math.pi * progress))
            assert learning_rate(step, config) == then


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optim.warmup=0.1", "optim.warmup_steps=5"], r"optim\.warmup is 0\.1 and optim\.warmup_steps 5; to count"),
        (["optim.warmup_steps=1001"], r"optim\.warmup_steps is 1001; it is a number from 0 to optim\.steps = 1000"),
        (["optim.schedule=cosinus"], r"optim\.schedule is 'cosinus'; it can be cosine, linear or constant; did you"),
        (["optim.schedule=constant", "optim.min_lr_rate=0.1"], r"min_lr_rate is 0\.1, but optim\.schedule=constant"),
        (["optim.min_lr_rate=2"], r"optim\.min_lr_rate is 2\.0; it is a share"),
        (["optim.weight_decay=-1"], r"optim\.weight_decay .* cannot be negative"),
        (["optim.groups.lora.lr=-1"], r"a group has lr -1.0 .* cannot be negative"),
        (["optim.groups.projector.lr=1"], r"optim\.groups has no 'projector'; did you mean projectors\?"),
        (["optim.groups={projectors.imagge: {lr: 1}}"], r"no 'projectors\.imagge'; did you mean projectors\.image\?"),
        (["optim.groups.lora.rate=1"], r"Key 'rate' not in 'OptimGroup'.*known are: lr, weight_decay$"),
        (
            ["optim.groups.projectors.image.lr=1"],
            r"a dot in its name: 'optim\.groups=\{projectors\.image: ",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(overrides, said):
    with pytest.raises(UserError, match=said):
        optim(*overrides)


def test_warm_up_can_be_counted_though_a_share_is_zero():
    assert learning_rate(0, optim("optim.lr=1", "optim.warmup=0", "optim.warmup_steps=4")) == 0.25


def test_a_recipe_written_with_groups_is_read_back(tmp_path):
    from anymal.config.settings import save

    given = ["optim.groups={projectors.audio: {lr: 1e-3}, lora: {weight_decay: 0}}", "optim.warmup_steps=3"]
    config = load(Config, None, [*NAMED, "data.shards=x", *given])
    save(config, tmp_path / "recipe.yaml")
    assert load(Config, tmp_path / "recipe.yaml") == config
    assert config.optim.groups["projectors.audio"].lr == 1e-3 and config.optim.groups["lora"].lr is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.schedule=linear", r"optim\.schedule was cosine, is linear"),
        ("optim.warmup_steps=9", r"optim\.warmup_steps was null, is 9"),
        ("optim.min_lr_rate=0.1", r"optim\.min_lr_rate was 0\.0, is 0\.1"),
        ("optim.groups.lora.lr=1e-3", r"optim\.groups\.lora\.lr was null, is 0\.001"),
        ("model.lora.rslora=true", r"model\.lora\.rslora was false, is true"),
        ("model.lora.init=gaussian", r"model\.lora\.init was default, is gaussian"),
        ("model.lora.modules_to_save=[lm_head]", r"modules_to_save was \[\], is \[\"lm_head\"\]"),
    ],
)
def test_a_run_does_not_go_on_with_other_ones(override, said):
    before, now = (load(Config, None, [*NAMED, "data.shards=x", *more]) for more in ([], [override]))
    with pytest.raises(UserError, match=said):
        compare(before, now, Path("RUN/step-1"), (1, 1))


# ------------------------------------------------------------------------------------------------------ groups

PATHS = [
    "llm.model.layers.0.q_proj.lora_A.default.weight",
    "llm.model.layers.0.q_proj.lora_magnitude_vector.default.weight",
    "llm.lm_head.modules_to_save.default.weight",
    "llm.model.norm.weight",
    "projectors.image.0.weight",
    "projectors.audio.0.weight",
    "trained_encoders.image.weight",
]


def grouped(*overrides: str) -> dict[str, tuple[float, float, list[str]]]:
    """By a group's name: its rate, its decay, and what is in it."""
    parameters = {path: nn.Parameter(torch.zeros(1)) for path in PATHS}
    path_of = {id(parameter): path for path, parameter in parameters.items()}
    groups = parameter_groups(parameters, optim("optim.lr=0.5", "optim.weight_decay=0.25", *overrides))
    assert sum(len(group["params"]) for group in groups) == len(PATHS)
    return {
        group["called"]: (group["lr"], group["weight_decay"], [path_of[id(p)] for p in group["params"]])
        for group in groups
    }


def test_without_groups_all_is_one_in_the_order_of_the_model():
    assert grouped() == {"": (0.5, 0.25, PATHS)}


def test_each_value_is_that_of_the_most_specific_name_that_sets_it():
    said = "{projectors: {lr: 1, weight_decay: 0}, projectors.audio: {lr: 2}, lora: {lr: 3}, encoders.image: {}}"
    assert grouped(f"optim.groups={said}") == {
        "lora": (3, 0.25, PATHS[:3]),
        "": (0.5, 0.25, PATHS[3:4]),
        "projectors": (1, 0, PATHS[4:5]),
        "projectors.audio": (2, 0, PATHS[5:6]),
        "encoders.image": (0.5, 0.25, PATHS[6:]),
    }


def test_all_rates_follow_one_schedule_from_peaks_of_their_own():
    config = optim("optim.lr=0.5", "optim.groups={projectors: {lr: 2}, lora: {weight_decay: 1}}", "optim.steps=10")
    groups = parameter_groups({path: nn.Parameter(torch.zeros(1)) for path in PATHS}, config)
    for step in range(10):
        assert set_learning_rate(groups, step, config) == {
            "lr": learning_rate(step, config),
            "lr/projectors": learning_rate(step, config, 2),
        }
        assert [group["lr"] for group in groups] == [learning_rate(step, config, group["peak"]) for group in groups]


def test_adamw_is_made_as_it_always_was(tiny_llm):
    model, _ = toy_model(tiny_llm, one=3, two=3)
    select_trainable(model, ["projectors"])
    config = optim("optim.lr=1e-3", "optim.weight_decay=0.1", "optim.betas=[0.8,0.9]")
    then = torch.optim.AdamW(list(trainable(model).values()), lr=1e-3, betas=(0.8, 0.9), weight_decay=0.1)
    now = make_optimizer(model, config)
    (one,), (other,) = then.param_groups, now.param_groups
    assert all(other[key] == value for key, value in one.items() if key != "params")
    assert all(a is b for a, b in zip(one["params"], other["params"], strict=True))


GROUPS = "optim.groups={projectors.one: {lr: 1e-2}, llm: {lr: 1e-3, weight_decay: 0.1}}"


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_moments_go_through_every_zero_stage_unharmed(tiny_llm, zero):
    model, _ = toy_model(tiny_llm, one=3, two=3)
    select_trainable(model, ["projectors", "llm"])
    modalities = [f"model.modalities.{name}.encoder=e" for name in ("one", "two")]
    config = load(Config, None, ["model.llm.name=x", *modalities, "data.shards=x", f"engine.zero={zero}", GROUPS])
    generator = torch.Generator().manual_seed(0)
    shapes = {name: parameter.shape for name, parameter in trainable(model).items()}
    moments = {
        f"{n}.{key}": torch.rand(s, generator=generator) for n, s in shapes.items() for key in ("exp_avg", "exp_avg_sq")
    }
    with processes(), engine_of(model, config) as engine:
        assert [group["called"] for group in engine.optimizer.param_groups] == ["llm", "projectors.one", ""]
        restore_moments(engine, moments.__getitem__, 3)
        back = full_moments(engine)
    assert back.keys() == moments.keys() and all(torch.equal(back[name], moments[name]) for name in moments)


@pytest.fixture(scope="module")
def given(tiny_llm, tmp_path_factory):
    """The settings of a run of stage 2, given its folder and more."""
    folder = tmp_path_factory.mktemp("optimizer")
    shards = write_pairs(folder / "pairs", ["image", "imu"], shards=1)
    encoders = make_encoders(folder / "encoders")
    more = {"optim__steps": 2, "run__save_every": 1, "model__lora__rank": 4, "train": "[projectors,lora]"}

    def run(name: str, *overrides: str) -> Path:
        stated = settings(tiny_llm, encoders, folder / name, shards, ["image", "imu"], **more)
        pretrain_here(None, *{text.split("=")[0]: text for text in (*stated, *overrides)}.values())
        return folder / name

    return run


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_run_with_groups_goes_on_to_the_bit(given, zero):
    groups = "optim.groups={projectors: {lr: 1e-2, weight_decay: 0.1}, projectors.imu: {lr: 3e-3}, lora: {lr: 1e-3}}"
    more = [f"engine.zero={zero}", groups, "optim.schedule=linear", "optim.warmup_steps=1", "optim.lr=1e-3"]
    run = given(f"zero{zero}", *more)
    line = metrics(run)[0]
    assert (line["lr"], line["lr/projectors"], line["lr/projectors.imu"]) == (1e-3, 1e-2, 3e-3)
    assert "lr/lora" not in line  # its peak is optim.lr
    whole, files = losses(run), ["lora/adapter_model", "training/optimizer", "adapters/imu/model"]
    last = run / "checkpoints" / "step-00000002"
    before = {name: (last / f"{name}.safetensors").read_bytes() for name in files}
    last.rename(run / "whole")
    go_back(run, 1)
    given(f"zero{zero}", *more)
    assert losses(run) == whole
    assert all((last / f"{name}.safetensors").read_bytes() == content for name, content in before.items())


def test_a_group_at_rate_zero_stays_and_the_others_learn(given):
    run = given("still", "optim.groups={lora: {lr: 0}, projectors.imu: {lr: 0}}")
    first, last = (run / "checkpoints" / f"step-0000000{n}" for n in (1, 2))
    for name, moved in (("lora/adapter_model", False), ("adapters/imu/model", False), ("adapters/image/model", True)):
        one, other = (load_file(folder / f"{name}.safetensors") for folder in (first, last))
        assert moved != all(torch.equal(one[key], other[key]) for key in one), name
