"""Whole runs: ranks, accumulation, resuming, what changes and what must not. Real DeepSpeed throughout."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

from anymal.adapters import REGISTRY
from anymal.checkpoints import checkpoint
from anymal.checkpoints.build import build
from anymal.checkpoints.state import load_training_state
from anymal.config.schema import Config, DataConfig
from anymal.config.settings import load
from anymal.data.quarantine import Quarantine
from anymal.data.stream import Stream
from anymal.errors import UserError
from anymal.model.trainable import fingerprint, select_trainable, trainable
from anymal.sample import Sample, Tokens
from anymal.training.engine import deepspeed_config
from anymal.training.optimizer import learning_rate
from anymal.training.run import run_stage
from small_runs import (
    ROOT,
    deepspeed,
    environment,
    go_back,
    losses,
    make_encoders,
    metrics,
    pretrain_here,
    python,
    settings,
    write_pairs,
    zero_stages,
)

KINDS = ["image", "imu"]


@pytest.fixture(scope="session")
def encoders(tmp_path_factory) -> Path:
    return make_encoders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("pairs"), KINDS)


@pytest.fixture
def stage(tiny_llm, encoders, shards, tmp_path):
    """Run a stage in this process; returns the run's folder."""

    def run(name: str = "run", start: str = "pretrain", **more) -> Path:
        defaults = ["train=[projectors]"] if start == "pretrain" else ["train=[projectors,lora]"]
        arguments = settings(tiny_llm, encoders, tmp_path / name, shards, KINDS, **more)
        run_stage(load(Config, None, arguments, defaults), REGISTRY)
        return tmp_path / name

    return run


def test_a_run_learns_and_leaves_everything_behind(stage):
    run = stage(optim__steps=12, run__save_every=5, run__keep=2, run__samples=2)
    curve = losses(run)
    assert sorted(curve) == list(range(1, 13))
    assert curve[12] < curve[1]
    line = metrics(run)[-1]
    assert {"loss/image", "loss/imu", "answer_tokens_per_s", "padding_share", "wait_share", "grad_norm"} <= set(line)
    kept = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert kept == ["latest", "step-00000010", "step-00000012"]
    latest = checkpoint.existing(run)
    assert latest.name == "step-00000012"
    card = (latest / "README.md").read_text()
    assert "apache-2.0" in card and "trained for 12 steps" in card
    shown = json.loads((run / "samples.jsonl").read_text().splitlines()[-1])
    assert shown["step"] == 12 and len(shown["rows"]) == 2
    assert load(Config, run / "recipe.yaml") == load(Config, latest / "recipe.yaml")
    assert not list(latest.rglob("*.pt")) and not list(latest.rglob("*.bin"))


def test_both_stages_change_what_they_train_and_nothing_else(stage, tiny_llm):
    first = stage("first", optim__steps=3)
    second = stage("second", start="finetune", optim__steps=3, model__checkpoint=first, model__lora__rank=4)
    device = torch.device("cpu")
    fresh = build(checkpoint.recipe(checkpoint.existing(first)), device, REGISTRY)
    before = build(checkpoint.recipe(checkpoint.existing(first)), device, REGISTRY, start=checkpoint.existing(first))
    after = build(checkpoint.recipe(checkpoint.existing(second)), device, REGISTRY, start=checkpoint.existing(second))
    assert fingerprint(before.model.llm) == fingerprint(fresh.model.llm)
    assert fingerprint(before.model.projectors) != fingerprint(fresh.model.projectors)
    assert fingerprint(after.model.projectors) != fingerprint(before.model.projectors)
    lora = [p for name, p in after.model.llm.named_parameters() if "lora_B" in name]
    assert lora and all(p.abs().sum() > 0 for p in lora)
    for kind in KINDS:
        assert fingerprint(after.model.encoders[kind]) == fingerprint(before.model.encoders[kind])


@pytest.mark.parametrize("bits", [4, 8])
def test_training_leaves_the_bytes_of_llm_and_encoders_alone(tiny_llm, encoders, shards, tmp_path, bits):
    from anymal.training.engine import make_engine, start_processes
    from anymal.training.loop import train
    from anymal.training.tracking import Tracker

    arguments = settings(tiny_llm, encoders, tmp_path, shards, KINDS, optim__steps=3, model__llm__bits=bits)
    config = load(Config, None, arguments, ["train=[projectors]"])
    _, _, device = start_processes()
    built = build(config, device, REGISTRY)
    select_trainable(built.model, config.train)
    frozen = {"llm": built.model.llm, **built.model.encoders}
    before = {name: fingerprint(module) for name, module in frozen.items()}
    learnt = {name: p.detach().clone() for name, p in trainable(built.model).items()}
    engine = make_engine(built.model, config)
    quarantine = Quarantine(None, max_in_a_row=0, max_share=0)
    parts = {"suffixes": REGISTRY.suffixes(), "prepare": built.prepare, "quarantine": quarantine}
    stream = Stream(config.data, **parts, seed=0)
    with Tracker(config.run, {}, rank=0, steps=3) as tracker:
        train(engine, stream, config=config, start=0, rank=0, tracker=tracker, save=lambda *_: None)
    assert {name: fingerprint(module) for name, module in frozen.items()} == before
    assert all(not torch.equal(p, learnt[name]) for name, p in trainable(built.model).items())


def test_resuming_continues_the_curve_bit_for_bit(stage):
    whole = losses(stage("whole", optim__steps=8, run__save_every=3, data__workers=2))
    stage("cut", optim__steps=8, run__save_every=3, data__workers=2)
    run = stage("other", optim__steps=6, run__save_every=3, data__workers=2)
    assert sorted(losses(run)) == list(range(1, 7))
    # Same recipe as `whole`, cut off after the checkpoint of step 3 as kill -9 would.
    cut = run.with_name("cut")
    for folder in ("step-00000006", "step-00000008"):
        _remove(cut / "checkpoints" / folder)
    link = cut / "checkpoints" / "latest"
    link.unlink()
    link.symlink_to("step-00000003")
    resumed = losses(stage("cut", optim__steps=8, run__save_every=3, data__workers=0))
    assert resumed == whole


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder)


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_every_zero_stage_resumes_exactly(stage, zero):
    whole = losses(stage("whole", optim__steps=6, run__save_every=3, engine__zero=zero))
    run = stage("half", optim__steps=6, run__save_every=3, engine__zero=zero)
    _remove(run / "checkpoints" / "step-00000006")
    go_back(run, 3)
    again = losses(stage("half", optim__steps=6, run__save_every=3, engine__zero=zero))
    assert again == whole
    one = losses(stage("one", optim__steps=6, engine__zero=1))
    assert whole == pytest.approx(one, rel=1e-5)


def test_a_run_under_zero_3_leaves_torch_as_it_was(stage):
    stage(optim__steps=1, engine__zero=3)
    assert torch.nn.functional.linear is torch._C._nn.linear


def test_lora_dropout_resumes_exactly(stage):
    more = {"start": "finetune", "model__lora__rank": 4, "model__lora__dropout": 0.3, "run__save_every": 2}
    whole = losses(stage("whole", optim__steps=4, **more))
    run = stage("cut", optim__steps=4, **more)
    _remove(run / "checkpoints" / "step-00000004")
    go_back(run, 2)
    assert losses(stage("cut", optim__steps=4, **more)) == whole


def test_a_damaged_projector_is_named(stage):
    run = stage("first", optim__steps=1)
    file = run / "checkpoints" / "latest" / "adapters" / "imu" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"imu/model\.safetensors is damaged"):
        stage("second", optim__steps=1, model__checkpoint=run)


def test_a_damaged_description_of_a_projector_is_named(stage):
    run = stage("first", optim__steps=1)
    file = run / "checkpoints" / "latest" / "adapters" / "imu" / "adapter_config.json"
    for content in ("{", "[]", None):
        file.unlink() if content is None else file.write_text(content)
        with pytest.raises(UserError, match=r"imu/adapter_config\.json is missing or damaged"):
            stage("second", optim__steps=1, model__checkpoint=run)


def test_going_back_to_an_older_checkpoint_keeps_what_is_written_from_there(stage):
    run = stage(optim__steps=6, run__save_every=2, run__keep=3)
    whole, old = losses(run), run / "checkpoints" / "step-00000002"
    stage(optim__steps=6, run__save_every=1, run__keep=3, run__resume=old)
    assert losses(run) == whole
    assert checkpoint.existing(run).name == "step-00000006"
    kept = {p.name for p in (run / "checkpoints").iterdir()}
    assert kept == {"latest", "step-00000004", "step-00000005", "step-00000006"}  # the newest by time


def test_a_lora_of_another_rank_is_refused(stage):
    first = stage("first", start="finetune", optim__steps=1, model__lora__rank=4)
    with pytest.raises(UserError, match=r"has rank 4 and alpha 16, the recipe says model\.lora\.rank=8"):
        stage("second", start="finetune", optim__steps=1, model__lora__rank=8, model__checkpoint=first)


def test_a_resume_with_other_parameters_trainable_is_refused(stage):
    stage(optim__steps=2)
    with pytest.raises(UserError, match=r"made with other parameters trainable: .* is gone.*model\.checkpoint="):
        stage(optim__steps=4, train="[projectors.image]")


def test_never_resume_refuses_a_folder_in_use(stage):
    stage(optim__steps=1)
    with pytest.raises(UserError, match="already holds checkpoints"):
        stage(optim__steps=1, run__resume="never")


def test_a_projector_that_does_not_fit_is_named(stage):
    first = stage("first", optim__steps=1)
    with pytest.raises(UserError, match=r"does not fit model\.modalities\.image\.projector, which has width 24 here"):
        more = {"model__checkpoint": first, "model__modalities__image__projector__width": 24}
        stage("second", optim__steps=1, **more)


def test_an_llm_that_mixes_packed_samples_is_refused_but_for_rows_of_one(stage, tiny_llm, tmp_path):
    folder = tmp_path / "opt"
    config = transformers.OPTConfig(
        vocab_size=302, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32
    )
    transformers.OPTForCausalLM(config).save_pretrained(folder)
    for file in [*tiny_llm.glob("token*"), *tiny_llm.glob("chat_template*")]:
        (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"see one another; .* data\.batch_size=1"):
        stage(optim__steps=1, model__llm__name=folder, model__llm__attention="sdpa")
    stage("alone", optim__steps=1, model__llm__name=folder, model__llm__attention="sdpa", data__batch_size=1)
    stage("packed", optim__steps=1, model__llm__name=folder)


def test_accumulation_divides_by_all_answers(stage):
    one = losses(stage("one", data__batch_size=8, optim__steps=5))
    four = losses(stage("four", data__batch_size=2, optim__gradient_accumulation=4, optim__steps=5))
    assert four == pytest.approx(one, rel=1e-5)


def test_learning_rate_rises_then_falls_to_zero():
    config = load(Config, None, ["model.llm.name=x", "optim.lr=1", "optim.steps=100", "optim.warmup=0.1"])
    rates = [learning_rate(step, config.optim) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1
    assert all(a > b for a, b in itertools.pairwise(rates[10:])) and rates[-1] < 0.001


def test_deepspeed_settings_that_contradict_the_recipe_are_refused(tmp_path):
    extra = tmp_path / "extra.json"
    arguments = ["model.llm.name=x", f"engine.deepspeed={extra}", "engine.zero=2"]
    extra.write_text('{"zero_optimization": {"stage": 3}}')
    with pytest.raises(UserError, match=r"stage is 3, but the recipe says 2"):
        deepspeed_config(load(Config, None, arguments))
    extra.write_text('{"zero_optimization": {"overlap_comm": true}, "wall_clock_breakdown": true}')
    merged = deepspeed_config(load(Config, None, arguments))
    assert merged["zero_optimization"] == {"stage": 2, "overlap_comm": True} and merged["wall_clock_breakdown"]


@pytest.mark.slow
def test_two_ranks_are_one_rank_with_two_micro_batches(tiny_llm, encoders, shards, tmp_path):
    more = {"optim__steps": 6, "run__save_every": 3, "run__samples": 2}
    recipe = zero_stages(tmp_path / "recipe.yaml", 1, 3)
    two = settings(tiny_llm, encoders, tmp_path / "two", shards, KINDS, **more)
    deepspeed(2, "launch/pretrain.py", recipe, *two)
    one = settings(tiny_llm, encoders, tmp_path / "one", shards, KINDS, optim__gradient_accumulation=2, **more)
    pretrain_here(recipe, *one)
    runs = [(tmp_path / "two" / name, tmp_path / "one" / name) for name in ("zero1", "zero3")]
    for two, one in runs:
        assert losses(two) == pytest.approx(losses(one), rel=1e-5)
        go_back(two, 3)
    # One rank goes on where two stopped: nothing that is saved depends on their number.
    alone = settings(tiny_llm, encoders, tmp_path / "two", shards, KINDS, optim__gradient_accumulation=2, **more)
    pretrain_here(recipe, *alone)
    for two, one in runs:
        assert sorted(losses(two)) == [1, 2, 3, 4, 5, 6]
        assert losses(two) == pytest.approx(losses(one), rel=1e-5)


def key_only(sample: Sample) -> Tokens:
    return Tokens(key=sample.key, ids=[], labels=[], runs=[], media=[])


def seen_by_ranks(shards: str) -> list[set[str]]:
    """The modalities that each of two ranks gets from unshuffled shards in two epochs."""
    found = []
    for rank in range(2):
        quarantine = Quarantine(None, max_in_a_row=0, max_share=0)
        parts = {"suffixes": REGISTRY.suffixes(), "prepare": key_only, "quarantine": quarantine}
        stream = Stream(
            DataConfig(shards=shards, shuffle=0, workers=0, batch_size=2), **parts, seed=0, rank=rank, world=2
        )
        found.append({key.split("-")[0] for batch in itertools.islice(stream, 20) for key in batch.keys})
    return found


@pytest.mark.slow
def test_ranks_that_see_different_modalities_do_not_wait_forever(tiny_llm, encoders, tmp_path):
    """Shards in which images and sounds alternate, unshuffled: rank 0 gets only images, rank 1 only sounds."""
    kinds = ["image", "audio"]
    mixed = write_pairs(tmp_path / "mixed", kinds, shards=1, per_shard=40)
    more = {"optim__steps": 100, "data__shuffle": 0, "data__batch_size": 2}
    assert seen_by_ranks(mixed) == [{"image"}, {"audio"}]
    run = settings(tiny_llm, encoders, tmp_path / "run", mixed, kinds, **more)
    deepspeed(2, "launch/pretrain.py", zero_stages(tmp_path / "recipe.yaml", 2, 3), *run)
    for name in ("zero2", "zero3"):
        lines = metrics(tmp_path / "run" / name)
        assert len(lines) == 100
        assert all("loss/image" in line and "loss/audio" in line for line in lines)
        assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.slow
def test_kill_minus_nine_then_the_same_command_goes_on_bit_for_bit(tiny_llm, encoders, shards, tmp_path):
    more = {"optim__steps": 30, "run__save_every": 4, "data__workers": 2, "run__wandb": "offline"}
    whole = settings(tiny_llm, encoders, tmp_path / "whole", shards, KINDS, **more | {"run__wandb": "disabled"})
    pretrain_here(None, *whole)
    command = [sys.executable, str(ROOT / "launch/pretrain.py")]
    command += settings(tiny_llm, encoders, tmp_path / "killed", shards, KINDS, **more)
    process = subprocess.Popen(
        command, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) >= 14):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert len(log.read_text().splitlines()) < 30
    python(*["launch/pretrain.py", *command[2:]])
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    pieces = list((tmp_path / "killed" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(pieces) == 2 and len({piece.name for piece in pieces}) == 1


@pytest.mark.slow
def test_killed_at_random_moments_packed_blended_on_two_ranks(tmp_path):
    """A small part of what tests/training/kill_matrix.py does: two workers, two ranks, packing, two datasets."""
    done = python("tests/training/kill_matrix.py", "--kills", "2", "--last", "1")
    assert "kills=2 equal=2" in done.stdout and done.stdout.rstrip().endswith("goal=met")


@pytest.mark.slow
def test_a_stop_signal_saves_before_the_run_ends(tiny_llm, encoders, shards, tmp_path):
    more = {"optim__steps": 5000, "run__save_every": 5000, "data__workers": 2}
    command = [sys.executable, str(ROOT / "launch/pretrain.py")]
    command += settings(tiny_llm, encoders, tmp_path / "run", shards, KINDS, **more)
    group = {"start_new_session": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=environment(), cwd=ROOT, text=True, **group)
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)  # as launchers and Slurm do: the loader's workers hear it too
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1, said
    saved = load_training_state(checkpoint.existing(tmp_path / "run"))
    assert saved.step == max(losses(tmp_path / "run"))
