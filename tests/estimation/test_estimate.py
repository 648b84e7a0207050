"""What is estimated without weights is what the weights then take."""

import gc
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import tiny_encoders
from anymal.adapters import REGISTRY
from anymal.checkpoints.build import build
from anymal.config.schema import Config
from anymal.config.settings import load
from anymal.config.stages import load_untrained
from anymal.data.loader import prefetched
from anymal.data.packing import Item, Row
from anymal.errors import UserError
from anymal.estimation.fake_llm import config_of, stored_bytes
from anymal.estimation.fake_step import FakeStep, Workload
from anymal.estimation.peak import WORKSPACES, Prediction, largest_batch, media_on_host, predict
from anymal.estimation.predict import EstimateConfig, arithmetic, llm_config_of, room_left
from anymal.model.llm import read_config
from anymal.model.trainable import select_trainable
from anymal.training.prefetch import Prefetcher
from conftest import make_llm
from small_runs import make_encoders, python

KINDS = ["image", "imu"]
WORK = Workload(tokens=48, answers=12)
LLAMA = "vocab_size: 302, hidden_size: 128, intermediate_size: 256, num_hidden_layers: 6, num_attention_heads: 4"
ARCHITECTURE = f"architecture={{model_type: llama, {LLAMA}, num_key_value_heads: 2}}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_llm(folder / "llm", width=128, layers=6)
    make_encoders(folder)
    return folder


def _config(folders, *more: str, zero: int = 0, llm: Path | None = None) -> Config:
    given = [f"model.llm.name={llm or folders / 'llm'}", f"engine.zero={zero}"]
    for kind in KINDS:
        given += [f"model.modalities.{kind}.encoder={folders / kind}", f"model.modalities.{kind}.projector.tokens=4"]
    return load(Config, None, [*given, "model.modalities.imu.options.rate=50", *more])


@pytest.mark.parametrize("real", [False, True])
def test_media_are_of_the_dtype_in_which_they_travel(folders, real):
    config = _config(folders, "train=[projectors,encoders.image]")
    for gpu, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        media = FakeStep(config, REGISTRY, gpu=gpu).batch(WORK, 2, real=real).media
        assert {kind: medium.dtype for kind, medium in media.items()} == {"image": torch.uint8, "imu": dtype}


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (100, 96), (300, 512)])
def test_bytes_of_a_quantised_matrix(rows, columns):
    """4 bits: half a byte a weight, a scale of a byte for each 64, a float32 scale for each 256 of those, tables.

    8 bits: a byte a weight, and a float32 scale for each row.
    """
    from bitsandbytes.nn import Int8Params, Linear4bit, Params4bit

    layer = Linear4bit(columns, rows, bias=False, quant_type="nf4")
    layer.weight = Params4bit(torch.randn(rows, columns), requires_grad=False, quant_type="nf4").to("cpu")
    scales = math.ceil(rows * columns / 64)
    tables = 4 * (math.ceil(scales / 256) + 1 + 16 + 256)  # the scales' scales and mean, and both codes
    assert stored_bytes(layer) == math.ceil(rows * columns / 2) + scales + tables
    eight = Int8Params(torch.randn(rows, columns), requires_grad=False).to("cpu")
    assert eight.CB.numel() + 4 * eight.SCB.numel() == rows * columns + 4 * rows


def _measured(config: Config, tokens) -> int:
    """Peak bytes of an optimizer step of the real model and of the next one's encoding, by torch's own profiler."""
    from torch.profiler import ProfilerActivity, profile

    model = build(config, torch.device("cpu"), REGISTRY).model
    select_trainable(model, config.train)
    resident = stored_bytes(nn.ModuleList([network for _, network in model.networks()]))
    row = Row(items=[Item(position=n, dataset="", tokens=sample) for n, sample in enumerate(tokens)])
    prefetcher = Prefetcher(model)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        prefetcher.start(row)
        batch, features = prefetcher.take()
        total, _ = model(batch, features)
        del features
        total.backward()
        prefetcher.start(row)
    now = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return resident + most


DORA = [
    "model.llm.bits=4",
    "train=[projectors,lora]",
    "model.lora.dora=true",
    "model.lora.modules_to_save=[embed_tokens]",
]


@pytest.mark.parametrize(
    "overrides", [["model.llm.bits=4"], ["model.llm.bits=32", "model.llm.checkpointing=full"], DORA]
)
def test_the_estimate_is_what_is_allocated(folders, overrides):
    config = _config(folders, *overrides)
    fake_step = FakeStep(config, REGISTRY, gpu=False)
    moments = fake_step.resident_memory().trained * 8  # of AdamW, which is not run here
    estimated = predict(fake_step, WORK, 6, world=1)
    assert estimated.total - moments == pytest.approx(
        _measured(config, fake_step.samples(WORK, 6, real=True)), rel=0.03
    )


def test_encoders_that_take_most_are_what_is_allocated(folders, tmp_path):
    small = make_llm(tmp_path / "llm", width=16, layers=1)
    config = _config(folders, "model.llm.bits=32", llm=small)
    pictures = Workload(tokens=5, answers=1, media=["image"])
    fake_step = FakeStep(config, REGISTRY, gpu=False)
    peaks = fake_step.peaks(pictures, 64)
    assert max(peaks, key=lambda phase: peaks[phase].total()) == "encode"
    resident = fake_step.resident_memory()
    estimated = resident.body + resident.embeddings_and_head + resident.encoders + 8 * resident.trained
    estimated += peaks["encode"].total()
    measured = _measured(config, fake_step.samples(pictures, 64, real=True))
    assert estimated == pytest.approx(measured, rel=0.03)
    assert predict(fake_step, pictures, 64, world=1).total == estimated + 8 * resident.trained


@pytest.mark.parametrize("overrides", [[], ["model.llm.checkpointing=full", "train=[projectors,lora]"]])
def test_two_depths_are_extrapolated_to_a_third(folders, monkeypatch, overrides):
    config = _config(folders, *overrides)
    extrapolated = predict(FakeStep(config, REGISTRY, gpu=True), WORK, 4, world=1)
    monkeypatch.setattr("anymal.estimation.fake_step.DEPTHS", (9, 9))  # deeper than the LLM: it is run as it is
    whole = FakeStep(config, REGISTRY, gpu=True)
    assert whole._depths == (6,)
    assert extrapolated.total == pytest.approx(predict(whole, WORK, 4, world=1).total, rel=0.01)


def test_recomputing_and_zero_take_less(folders):
    def total(world: int, *more: str, zero: int = 0) -> int:
        config = _config(folders, *more, zero=zero)
        return predict(FakeStep(config, REGISTRY, gpu=True), WORK, 8, world=world).total - WORKSPACES

    kept = total(1)
    assert total(1, "model.llm.checkpointing=full") < 0.8 * kept
    assert total(8, zero=1) < total(1, zero=1)


def test_on_a_gpu_the_next_micro_batch_is_encoded_beside_the_llm_and_on_a_cpu_after_it(folders):
    pictures = Workload(tokens=16, answers=12, media=["image"])

    def parts(*, gpu: bool, work: Workload = pictures) -> tuple[Prediction, dict[str, int], int]:
        fake_step = FakeStep(_config(folders, "model.llm.bits=32"), REGISTRY, gpu=gpu)
        resident = fake_step.resident_memory()
        between = resident.body + resident.embeddings_and_head + resident.encoders + 12 * resident.trained
        phases = {phase: peak.total() for phase, peak in fake_step.peaks(work, 40).items()}
        return predict(fake_step, work, 40, world=1), phases, between

    predicted, phases, between = parts(gpu=True)
    llm = max(phases["language model"], phases["projectors backward"])
    assert predicted.total == between + WORKSPACES + llm + phases["encode"]
    assert predicted.by_part["encoding the next micro-batch"] == phases["encode"] > phases["features"] > 0
    assert predicted.tensors < predicted.total - 0.5 * min(llm, phases["encode"])
    assert largest_batch(
        FakeStep(_config(folders, "model.llm.bits=32"), REGISTRY, gpu=True), pictures, predicted.total, world=1
    ) in (39, 40)

    predicted, phases, between = parts(gpu=False)
    llm = max(phases["language model"], phases["projectors backward"])
    assert predicted.total == predicted.tensors < between + llm + phases["encode"]

    cached, phases, _ = parts(gpu=True, work=replace(pictures, cached=True))
    assert phases["encode"] < 0.5 * parts(gpu=True)[1]["encode"], "features in place of media"
    assert cached.by_part["features"] == phases["features"]


def test_host_memory_is_a_step_of_media_and_one_micro_batch_and_what_workers_are_ahead(folders):
    settings = ["optim.gradient_accumulation=3", "data.batch_size=4", "data.workers=2"]
    fake_step = FakeStep(_config(folders, *settings), REGISTRY, gpu=True)
    work = Workload(tokens=48, answers=12, media=["image"])
    medium = fake_step.media_sizes(work, 1)["image"]
    assert medium == math.prod(fake_step.adapters["image"].encoder.shape), "a byte a pixel and channel"
    waiting = media_on_host(fake_step, work, 4, fake_step.config)
    chunk, prefetch = prefetched(fake_step.config.data)
    assert (chunk, prefetch) == (2, 2)
    assert waiting == {
        "rows of this step and the next": 4 * 4 * medium,
        "workers' results and packing": (2 * 2 * 2 + 2) * medium,
        "page-locked, on the way to the GPU": 2 ** math.ceil(math.log2(4 * medium)),
    }
    packed = replace(fake_step.config.data, row_tokens=2048, packing_buffer=16, workers=0)
    later = media_on_host(fake_step, work, 4, replace(fake_step.config, data=packed))
    assert later["workers' results and packing"] == (1 + 16) * medium


def test_encoding_takes_a_chunk_at_a_time(folders):
    def encode(*more: str) -> int:
        fake_step = FakeStep(_config(folders, "model.llm.bits=32", *more), REGISTRY, gpu=True)
        return fake_step.peaks(Workload(tokens=16, answers=12, media=["image"]), 64)["encode"].total()

    assert encode("model.modalities.image.encoder_batch_size=4") < 0.5 * encode()


def test_the_largest_batch_fits_and_one_more_does_not(folders):
    fake_step = FakeStep(_config(folders), REGISTRY, gpu=True)
    room = predict(fake_step, WORK, 30, world=1).total
    most = largest_batch(fake_step, WORK, room, world=1)
    assert 29 <= most <= 30
    assert largest_batch(fake_step, WORK, 1000, world=1) == 0


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_a_step_on_a_gpu_is_run_on_fake_tensors_at_every_precision(folders, bits):
    """With key heads that several query heads share: at 32 bits the GPU's kernel is one that cannot share them."""
    fake_step = FakeStep(_config(folders, f"model.llm.bits={bits}"), REGISTRY, gpu=True)
    peaks = fake_step.peaks(WORK, 6)
    assert all(peak.total() > 0 for peak in peaks.values())
    assert all(list(peak) == sorted(peak) for peak in peaks.values()), "in an order that no hash seed changes"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("media=[imgae]", r"media: the model has no modality 'imgae'; did you mean image\?"),
        ("world=0", "world is 0; it must be positive"),
        ("sample_tokens=8", "sample_tokens is 8, but answer_tokens 40"),
    ],
)
def test_what_cannot_be_estimated_is_named(setting, said):
    given = ["model.llm.name=x", "model.modalities.image.encoder=x", setting]
    with pytest.raises(UserError, match=said):
        load(EstimateConfig, None, given)


def test_the_program_needs_no_weights(folders, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folders, bare, ignore=shutil.ignore_patterns("*.safetensors", "llm"))
    config = _config(bare)
    del config.model.modalities["image"]  # half of the time, and nothing that it alone would show
    recipe = tmp_path / "recipe.yaml"
    from anymal.config.settings import save

    save(config, recipe)
    done = python(
        "launch/estimate.py",
        str(recipe),
        ARCHITECTURE,
        "sample_tokens=48",
        "answer_tokens=12",
        "run.peak_tflops=100",
        "gpu_gb=0.03",
        "reserve_gb=0",
    )
    assert re.fullmatch(r"fits: (yes|no), by 0\.\d+ GB", done.stdout.strip().splitlines()[-1])
    tables = ("LLM body, 4 bits", "in all", "Largest micro-batch", "none (the recipe's)", "floor, at 100", "caching")
    for said in tables:
        assert said in done.stdout
    assert "Failed" not in done.stderr and "Traceback" not in done.stderr


def _estimated(folders, *more: str) -> EstimateConfig:
    given = ["model.llm.name=gated/llm", f"model.modalities.imu.encoder={folders / 'imu'}", "sample_tokens=48"]
    given += ["model.modalities.imu.options.rate=50", "answer_tokens=12", "data.batch_size=2", "reserve_gb=1"]
    return load(EstimateConfig, None, [*given, ARCHITECTURE, *more])


def test_an_architecture_stands_for_files_that_are_gated(folders):
    config = _estimated(folders, "gpu_gb=2")
    by_name = read_config(str(folders / "llm"))
    totals = [
        predict(FakeStep(config, REGISTRY, gpu=True, llm_config=llm), WORK, 2, world=1)
        for llm in (llm_config_of(config), by_name)
    ]
    assert totals[0] == totals[1]
    assert room_left(config, totals[0]) == pytest.approx(1e9 - totals[0].total)


def test_hours_count_what_is_recomputed(folders):
    def seconds(mode: str) -> dict[str, float]:
        config = _estimated(folders, f"model.llm.checkpointing={mode}", "tflops=1e-6", "run.peak_tflops=1e-6")
        lines = arithmetic(FakeStep(config, REGISTRY, gpu=True, llm_config=llm_config_of(config)), WORK, 2, config)
        rows = re.findall(r"^ +(floor|and with|at)(?:.*?)  +([\d.]+) ", "\n".join(lines), re.MULTILINE)
        return {name: float(number) for name, number in rows}

    full, none = seconds("full"), seconds("none")
    assert full["at"] == full["and with"] > 1.2 * full["floor"]
    assert none["at"] == none["floor"] == full["floor"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{model_type: lama}", "architecture.model_type is 'lama'; it is that of a config.json, such as llama"),
        ("{model_type: llama, hiden_size: 8}", r"architecture: llama has no hiden_size; did you mean hidden_size\?"),
        ("{model_type: llama, hidden_size: 30}", r"architecture: .*hidden size \(30\) is not a multiple"),
    ],
)
def test_an_architecture_that_is_none_is_refused(given, said):
    with pytest.raises(UserError, match=said):
        config_of(
            load(EstimateConfig, None, ["model.llm.name=x", f"architecture={given}"]).architecture, "architecture"
        )


def test_media_in_views_take_what_the_context_allows(folders):
    where = "model.modalities.image"
    tiles = [f"{where}.options.tiles=area", f"{where}.options.max_tiles=16", "data.max_tokens=60"]
    fake_step = FakeStep(_config(folders, *tiles), REGISTRY, gpu=False)
    tiled = Workload(tokens=48, answers=12, media=["image"])
    assert fake_step.rows(tiled, 1) == [(12 + 12 * 4, 12 * ["image"])]
    assert fake_step.mean_tokens(tiled) == fake_step.batch(tiled, 1).ids.numel() == 60
    assert fake_step.mean_tokens(WORK) == (60 + 48) / 2  # pictures and motion take turns
    needed, _ = fake_step.flops(tiled, 2)
    assert needed["LLM body (4N)"] == 4 * fake_step.step_flops.llm.body * 120


def test_encoders_that_are_yet_to_be_trained_are_estimated_by_what_they_are_made_from(folders, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "stages:\n"
        f"  - {{name: align, train: [encoders], model: {{modalities: {{image: {{encoder: {folders}/image}}}}}}}}\n"
        "  - name: combine\n"
        "    model:\n"
        "      modalities: {image: {encoder: {channels: ['${run.dir}/align/checkpoints/latest/encoders/image']}}}\n"
    )
    given = [f"model.llm.name={folders}/llm", f"run.dir={tmp_path}", "stage=combine"]
    (combine,) = load_untrained(EstimateConfig, recipe, given)
    assert combine.model.modalities["image"].encoder == {"channels": [f"{folders}/image"]}
    assert FakeStep(combine, REGISTRY, gpu=False).resident_memory().encoders > 0


def test_a_network_that_needs_numbers_is_refused(folders, tmp_path):
    flexible = f"model.modalities.image.encoder={tiny_encoders.siglip2(tmp_path)}"
    given = [f"model.llm.name={folders / 'llm'}", flexible, "model.modalities.image.projector.tokens=4"]
    with pytest.raises(UserError, match=r"SigLIP 2 of flexible resolution does.*another encoder"):
        FakeStep(load(Config, None, given), REGISTRY, gpu=False).peaks(WORK, 2)
