"""Gated cross-attention: shut gates change no bit; tokens see what they should and nothing else, generated ones too."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tiny_llms
from anymal.adapters import REGISTRY
from anymal.adapters.projectors.cross import GatedCrossAttention
from anymal.checkpoints import checkpoint
from anymal.checkpoints.build import build
from anymal.config.schema import Config, LLMConfig, LoraConfig, ProjectorConfig, PromptConfig
from anymal.config.settings import load
from anymal.data.packing import pack
from anymal.data.prompt import Prompt
from anymal.errors import UserError
from anymal.estimation.fake_step import FakeStep, Workload
from anymal.modality import Adapter, Modality
from anymal.model import attention
from anymal.model.cross_attention import CrossAttention, MediaSpan, VisibleMedia, cross_attend, media_spans
from anymal.model.flops import StepFlops, llm_flops
from anymal.model.generate import embed_prompt, generate, log_likelihoods
from anymal.model.llm import add_lora, load_llm
from anymal.model.multimodal import AnyMAL
from anymal.model.trainable import fingerprint, select_trainable, trainable
from anymal.sample import IGNORED, Part, Tokens, Views
from small_runs import deepspeed, go_back, losses, make_encoders, pretrain_here, settings, write_pairs
from toys import ToyEncoder, ToyOptions, ToyProjector, build_projector, medium, sample, text

CPU = torch.device("cpu")
SAMPLES = [
    sample(medium("eye", 1), text("what is this?"), answer="a dog", key="a"),
    sample(text("hear "), medium("ear", 5), text(" see "), medium("eye", 2), text(" and "), medium("eye", 3), key="b"),
    sample(text("only text"), answer="yes it is", key="c"),
    sample(medium("ear", 7), medium("ear", 8), answer="it is a table", key="d"),
]


def projector(llm_width: int, layers: int, **options) -> torch.nn.Module:
    """Of a `ToyEncoder`'s features, with two latents of eight channels; its gates are shut."""
    chosen = {"every": 1, "feed_forward": 2} | options
    config = ProjectorConfig(kind="cross_attention", tokens=2, layers=1, heads=2, width=8, options=chosen)
    return build_projector(config, [(3, 4)], llm_width, 0.1, llm_layers=layers)


def adapters(llm, **projectors) -> dict[str, Adapter]:
    found = {}
    for name, made in projectors.items():
        modality = Modality(name=name, suffixes=(f"{name}.bin",), options=ToyOptions, load=lambda *_: ToyEncoder())
        found[name] = Adapter(modality, ToyEncoder(3), made)
    return found


def prompt_for(tokenizer, model: AnyMAL) -> Prompt:
    lengths = {name: made.tokens for name, made in model.projectors.items()}
    names = {name: f"<{name}>" for name in lengths}
    return Prompt(tokenizer=tokenizer, config=PromptConfig(), placeholder=names, length=lengths)


def toy(folder: Path, *, bits: int = 32, lora: bool = False, gates: float = 0.7, splice=False, **more):
    """A tiny LLM with two modalities that speak by cross-attention; with `splice`, the second is spliced in."""
    llm, tokenizer = load_llm(LLMConfig(name=str(folder), bits=bits, checkpointing=more.pop("mode", "none")), CPU)
    torch.manual_seed(0)
    if lora:
        llm = add_lora(llm, LoraConfig(rank=2))
    ear = ToyProjector(3, 4, 64) if splice else projector(64, 2, **more)
    model = AnyMAL(llm, adapters(llm, eye=projector(64, 2, **more), ear=ear))
    open_gates(model, gates)
    select_trainable(model, ["projectors", "lora"] if lora else ["projectors"])
    return model, prompt_for(tokenizer, model)


def open_gates(model: AnyMAL, value: float) -> None:
    for name, parameter in model.projectors.named_parameters():
        if name.endswith("gate"):
            parameter.data.fill_(value)


def without(model: AnyMAL, batch) -> torch.Tensor:
    """The logits of the LLM alone over the same row: its hooks are shut."""
    row = model.embed(batch, model.encode(batch.media))[0]
    more = attention.arguments(model.llm, batch.lengths, batch.offsets)
    return model.llm(
        inputs_embeds=row, position_ids=batch.positions, use_cache=False, logits_to_keep=batch.answer_positions, **more
    ).logits[0]


def logits(model: AnyMAL, batch) -> torch.Tensor:
    return model.logits(batch, model.encode(batch.media))[0]


@pytest.mark.parametrize("bits", [32, 8, 4])
@torch.no_grad()
def test_shut_gates_change_no_bit_of_a_logit(tiny_llm, bits):
    model, prompt = toy(tiny_llm, bits=bits, gates=0.0)
    batch = pack([prompt.sample(s) for s in SAMPLES])
    assert torch.equal(logits(model, batch), without(model, batch))
    open_gates(model, 0.7)
    difference = (logits(model, batch) - without(model, batch)).abs().amax(1)
    text_only = [key == "c" for t in (prompt.sample(s) for s in SAMPLES) for key in [t.key] * answers(t)]
    assert ((difference == 0) == torch.tensor(text_only)).all(), "what sees no medium stays as it is"


def answers(tokens: Tokens) -> int:
    return sum(label != IGNORED for label in tokens.labels)


@pytest.mark.parametrize("name", [*tiny_llms.ARCHITECTURES, "Qwen3", "GPTNeoX", "Phi3"])
@torch.no_grad()
def test_shut_gates_change_no_bit_in_any_architecture(name, monkeypatch):
    monkeypatch.setattr(tiny_llms, "ARCHITECTURES", {"Qwen3": {}, "GPTNeoX": {}, "Phi3": {}} | tiny_llms.ARCHITECTURES)
    llm = tiny_llms.make(name)
    model = AnyMAL(llm, adapters(llm, eye=projector(32, 2)))
    runs = {"runs": [("eye", 2, 1)], "media": [torch.ones(1)]}
    batch = pack([Tokens(key="a", ids=[5, 6, 0, 7, 8], labels=[IGNORED] * 3 + [7, 8], **runs)])
    found = logits(model, batch)
    assert torch.equal(found, without(model, batch))
    open_gates(model, 0.7)
    assert not torch.allclose(logits(model, batch), found, atol=1e-3)


def test_an_llm_whose_layers_are_not_found_is_refused():
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)
    llm = transformers.GPT2LMHeadModel(config)
    with pytest.raises(UserError, match=r"modalities.eye.projector speaks .* GPT2LMHeadModel are not where"):
        AnyMAL(llm, adapters(llm, eye=projector(32, 2)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"options": {"every": 3}}, "every is 3, but the LLM has 2 decoder layers"),
        ({"heads": 3}, "width 8 cannot be split into 3 heads"),
        ({"options": {"last": True}}, "unknown option 'last'; did you mean last_only"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        build_projector(
            ProjectorConfig(**{"kind": "cross_attention", "width": 8} | settings), [(3, 4)], 16, llm_layers=2
        )


def test_blocks_stand_before_every_so_many_th_layer():
    assert list(projector(32, 13, every=4).bridges) == ["3", "7", "11"]
    assert list(projector(32, 3).bridges) == ["0", "1", "2"]


# ----------------------------------------------------------------------------------------------------- who sees what


def test_looks_are_ranges_within_the_sample():
    lengths, starts = [3, 6, 2, 4], [(4, 0), (7, 1), (11, 2), (12, 2), (14, 4)]  # 2 and 3 are views of one medium
    last = media_spans(lengths, starts, last_only=True)
    none, first = MediaSpan(3, 0, 0), [MediaSpan(1, 0, 0), MediaSpan(3, 0, 1)]
    assert last == [
        none, *first, MediaSpan(2, 1, 2), MediaSpan(2, 0, 0), MediaSpan(1, 2, 3), MediaSpan(2, 2, 4), MediaSpan(1, 4, 5)
    ]  # fmt: skip
    every = media_spans(lengths, starts, last_only=False)
    assert every == [
        none, *first, MediaSpan(2, 0, 2), MediaSpan(2, 0, 0), MediaSpan(1, 2, 3), MediaSpan(2, 2, 4), MediaSpan(1, 2, 5)
    ]  # fmt: skip
    assert media_spans([2, 3], [], last_only=True) == [MediaSpan(2, 0, 0), MediaSpan(3, 0, 0)]


def test_views_of_one_medium_are_seen_together(tiny_llm):
    model, prompt = toy(tiny_llm)
    views = Part(kind="eye", content=Views(tensor=torch.tensor([[1.0], [2.0], [4.0]])))
    tokens = prompt.sample(sample(medium("eye", 5), text("see "), views, text("and "), medium("ear", 9)))
    assert tokens.views == [1, 3, 1]
    batch = pack([prompt.sample(SAMPLES[0]), tokens])
    assert [first for _, first in batch.media_starts["eye"]] == [0, 1, 2, 2, 2]
    assert [first for _, first in batch.media_starts["ear"]] == [0]
    seen = model.visible_media(batch, model.encode(batch.media))["eye"].spans[0]
    assert (seen[-1].first, seen[-1].last) == (2, 5)


@torch.no_grad()
def test_a_block_equals_plain_loops():
    """Flamingo's equations for one token and one head after the other, over the media that it sees."""
    torch.manual_seed(0)
    block = GatedCrossAttention(llm_width=6, width=8, heads=2, feed_forward=3).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    hidden, latents = torch.randn(9, 6).double(), torch.randn(4, 3, 8).double()
    seen = [MediaSpan(2, 0, 1), MediaSpan(2, 1, 2), MediaSpan(1, 0, 3), MediaSpan(4, 1, 4)]
    expected = []
    for x, look in zip(hidden, [one for one in seen for _ in range(one.tokens)], strict=True):
        query = block.query(block.norm(x))
        memory = [block.key_value(latent) for one in range(look.first, look.last) for latent in latents[one]]
        gathered = []
        for head in (slice(0, 4), slice(4, 8)):
            weights = [math.exp(float(query[head] @ kv[:8][head]) / math.sqrt(4)) for kv in memory]
            gathered.append(sum(w * kv[8:][head] for w, kv in zip(weights, memory, strict=True)) / sum(weights))
        x = x + math.tanh(block.gate) * block.out(torch.cat(gathered))
        expected.append(x + math.tanh(block.feed_forward_gate) * block.feed_forward(x))
    torch.testing.assert_close(block(hidden, latents, seen), torch.stack(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("last_only", [True, False])
@torch.no_grad()
def test_which_tokens_a_medium_changes(last_only):
    made = projector(16, 1, last_only=last_only)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    hidden, latents = torch.randn(1, 9, 16), torch.randn(3, 2, 8)
    row = media_spans([6, 3], [(1, 0), (4, 1), (7, 2)], last_only=last_only)
    before = cross_attend(made.bridges["0"], hidden, VisibleMedia(latents=latents, spans=[row]))
    changed = []
    for number in range(3):
        other = latents.clone()
        other[number] += 1
        after = cross_attend(made.bridges["0"], hidden, VisibleMedia(latents=other, spans=[row]))
        changed.append([t for t in range(9) if not torch.equal(before[0, t], after[0, t])])
    assert changed == [[1, 2, 3] if last_only else [1, 2, 3, 4, 5], [4, 5], [7, 8]]
    assert torch.equal(before[0, [0, 6]], hidden[0, [0, 6]]) and before.isfinite().all()


@torch.no_grad()
def test_no_sample_sees_anothers_media_and_no_token_a_later_one(tiny_llm):
    model, prompt = toy(tiny_llm)
    tokens = [prompt.sample(s) for s in SAMPLES]
    batch = pack(tokens)
    found = logits(model, batch)
    owner = torch.tensor([n for n, t in enumerate(tokens) for _ in range(answers(t))])
    for changed in (0, 1, 3):
        media = [m + 1 for m in tokens[changed].media]
        other = pack([replace(t, media=media) if n == changed else t for n, t in enumerate(tokens)])
        differs = (logits(model, other) != found).any(1)
        assert torch.equal(differs, owner == changed)
    last = replace(tokens[1], labels=tokens[1].ids, media=[*tokens[1].media[:2], tokens[1].media[2] + 1])
    place = tokens[1].runs[2][1]
    row, other = pack([replace(last, media=tokens[1].media)]), pack([last])
    differs = (logits(model, row) != logits(model, other)).any(1)
    assert differs.tolist() == [t >= place for t in row.answer_positions.tolist()]


# --------------------------------------------------------------------------------------------------------- training


def gradients(model: AnyMAL, batches) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss, _ = model(batch, model.encode(batch.media))
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in trainable(model).items()}


@pytest.mark.parametrize(("last_only", "splice"), [(True, False), (False, False), (True, True)])
def test_packed_and_unpacked_losses_and_gradients_are_equal(tiny_llm, last_only, splice):
    model, prompt = toy(tiny_llm, last_only=last_only, splice=splice)
    tokens = [prompt.sample(s) for s in SAMPLES]
    one, ours = gradients(model, [pack(tokens)])
    other, theirs = gradients(model, [pack([t]) for t in tokens])
    assert one == pytest.approx(other, rel=1e-6)
    for name in theirs:
        scale = float(theirs[name].abs().max())
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5 * scale + 1e-7, msg=name)


@pytest.mark.parametrize("bits", [32, 4])
def test_gradients_reach_all_of_it_and_nothing_of_the_llm(tiny_llm, bits):
    model, prompt = toy(tiny_llm, bits=bits)
    before = fingerprint(model.llm)
    batch = pack([prompt.sample(s) for s in SAMPLES])
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    first, found = gradients(model, [batch])
    assert [name for name, gradient in found.items() if not gradient.any()] == []
    assert all(p.grad is None for p in model.llm.parameters())
    for _ in range(5):
        optimizer.step()
        last, _ = gradients(model, [batch])
    assert last < first and fingerprint(model.llm) == before


def test_shut_gates_open_by_themselves(tiny_llm):
    model, prompt = toy(tiny_llm, gates=0.0)
    _, found = gradients(model, [pack([prompt.sample(s) for s in SAMPLES])])
    learns = {name for name, gradient in found.items() if gradient.any()}
    assert learns == {name for name in found if name.endswith(("gate", "place"))}


@pytest.mark.parametrize(("bits", "lora"), [(32, False), (16, False), (4, True), (8, True)])
def test_checkpointing_changes_no_bit(tiny_llm, bits, lora):
    found = []
    for mode in ("none", "selective", "full"):
        model, prompt = toy(tiny_llm, bits=bits, lora=lora, mode=mode)
        batch = pack([prompt.sample(s) for s in SAMPLES])
        text_only = pack([prompt.sample(SAMPLES[2])])
        gradients(model, [batch])  # 8-bit layers move their scales at the first pass
        found.append(gradients(model, [batch, text_only, batch]))
    for total, other in found[1:]:
        assert total == found[0][0]
        assert all(torch.equal(other[name], gradient) for name, gradient in found[0][1].items())


def test_an_absent_modality_takes_part_with_weight_zero(tiny_llm):
    model, prompt = toy(tiny_llm)
    _, found = gradients(model, [pack([prompt.sample(SAMPLES[2])])])
    assert set(found) == set(trainable(model))
    assert not any(gradient.any() for gradient in found.values())
    _, found = gradients(model, [pack([prompt.sample(SAMPLES[0])])])
    assert all(gradient.any() == ("eye" in name) for name, gradient in found.items())


# ------------------------------------------------------------------------------------------------------- generation

ASKED = [
    sample(medium("eye", 1), text("what is this?"), key="a"),
    sample(
        text("hear "), medium("ear", 5), text(" and see "), medium("eye", 2), medium("eye", 9), text("so?"), key="b"
    ),
    sample(text("and nothing to see at all"), key="c"),
]


def greedy(model: AnyMAL, prompt: Prompt, question: Tokens, steps: int) -> str:
    """The likeliest tokens, one by one, each from a whole new pass over a row that holds those before it."""
    ids: list[int] = []
    for _ in range(steps):
        so_far = replace(question, ids=question.ids + ids, labels=[IGNORED] * len(question.ids + ids))
        batch = pack([so_far])
        batch.answer_positions = torch.tensor([batch.ids.shape[1] - 1])
        ids.append(int(logits(model, batch)[0].argmax()))
        if ids[-1] == prompt.tokenizer.eos_token_id:
            break
    return prompt.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize(("bits", "last_only"), [(32, True), (32, False), (4, True)])
@torch.no_grad()
def test_answers_with_a_cache_are_those_of_whole_rows(tiny_llm, bits, last_only):
    model, prompt = toy(tiny_llm, bits=bits, last_only=last_only, lora=True, gates=1.5)
    model.eval()
    questions = [prompt.question(s) for s in ASKED]
    together = generate(model, prompt.tokenizer, [embed_prompt(model, q) for q in questions], max_new_tokens=6)
    assert [one.text for one in together] == [greedy(model, prompt, q, 6) for q in questions]
    open_gates(model, 0.0)
    blind = generate(model, prompt.tokenizer, [embed_prompt(model, q) for q in questions], max_new_tokens=6)
    assert blind[2] == together[2] and blind[:2] != together[:2]


@torch.no_grad()
def test_beams_of_a_prompt_see_its_media(tiny_llm):
    model, prompt = toy(tiny_llm, gates=1.5)
    prompts = [embed_prompt(model, prompt.question(s)) for s in ASKED]
    search = {"max_new_tokens": 5, "num_beams": 3}
    together = generate(model, prompt.tokenizer, prompts, **search)
    assert together == [generate(model, prompt.tokenizer, [one], **search)[0] for one in prompts]


@torch.no_grad()
def test_likelihoods_are_minus_the_loss_of_each_answer(tiny_llm):
    model, prompt = toy(tiny_llm)
    options = [["a dog", "yes", "it is a red apple"], ["a", "the table is red " * 4], ["yes", "no"]]
    prompts = [embed_prompt(model, prompt.question(s)) for s in ASKED]
    found = log_likelihoods(
        model, prompts, [prompt.answers(s, several) for s, several in zip(ASKED, options, strict=True)]
    )
    for s, several, likelihoods in zip(ASKED, options, found, strict=True):
        for answer, likelihood in zip(several, likelihoods, strict=True):
            batch = pack([prompt.sample(sample(*s.messages[0].parts, answer=answer))])
            loss, _ = model(batch, model.encode(batch.media))
            torch.testing.assert_close(likelihood, -loss, rtol=1e-4, atol=1e-3)


# ------------------------------------------------------------------------------------------------------ whole programs


@pytest.fixture(scope="module")
def recipe(tiny_llm, tmp_path_factory) -> Config:
    """Images by cross-attention, IMU spliced in."""
    folder = tmp_path_factory.mktemp("cross")
    given = settings(tiny_llm, make_encoders(folder), folder / "run", "x", ["image", "imu"])
    more = ["kind=cross_attention", "heads=2", "options.every=2", "options.last_only=false"]
    return load(Config, None, given + [f"model.modalities.image.projector.{setting}" for setting in more])


def test_what_is_saved_is_what_is_loaded(recipe):
    built = build(recipe, CPU, REGISTRY)
    with torch.no_grad():
        for parameter in built.model.projectors.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    weights = {f"projectors.{name}": p.detach() for name, p in built.model.projectors.named_parameters()}
    folder = checkpoint.save(built, weights, {}, checkpoint.TrainingState(step=1), recipe)
    again = build(checkpoint.recipe(folder), CPU, REGISTRY, start=folder)
    assert not again.model.projectors["image"].last_only
    assert any("bridges.1.key_value" in name for name in weights)
    assert fingerprint(again.model.projectors) == fingerprint(built.model.projectors)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_a_recipe_with_it_is_estimated(recipe, mode):
    fake_step = FakeStep(recipe, REGISTRY, gpu=True).with_checkpointing(mode)
    work = Workload(tokens=48, answers=12)
    assert max(peak.total() for peak in fake_step.peaks(work, 4).values()) > 0
    flops, _ = fake_step.flops(work, 4)
    assert flops["cross-attention"] == 2 * 48 * fake_step.step_flops.cross_attention["image"] > 0
    needed, _ = fake_step.step_flops.count(fake_step.batch(work, 4, real=True))
    assert needed == flops.total()


def test_its_flops_are_those_that_torch_counts(tiny_llm):
    model, prompt = toy(tiny_llm)
    batch = pack([prompt.sample(SAMPLES[0])])
    row = media_spans(batch.lengths, batch.media_starts["eye"], last_only=True)
    made, hidden = model.projectors["eye"], torch.randn(1, batch.lengths[0], 64)
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):  # it does not count fused ones on CPUs
        visible = VisibleMedia(latents=made.context(torch.randn(1, 3, 4)), spans=[row])
        for block in made.bridges.values():
            cross_attend(block, hidden, visible)
    step_flops = StepFlops(model, llm_flops(model.llm))
    assert (
        3 * counter.get_total_flops()
        == step_flops.projector["eye"] + row[-1].tokens * step_flops.cross_attention["eye"]
    )


def test_hooks_do_nothing_outside(tiny_llm):
    llm, _ = load_llm(LLMConfig(name=str(tiny_llm), bits=32), CPU)
    row = torch.randn(1, 5, 64)
    before = llm(inputs_embeds=row).logits
    made = projector(64, 2)
    hooks = CrossAttention(llm, {"eye": made})
    for block in made.bridges.values():
        block.gate.data.fill_(1.0)
    assert torch.equal(llm(inputs_embeds=row).logits, before)
    visible = VisibleMedia(latents=torch.randn(1, 2, 8), spans=[[MediaSpan(5, 0, 1)]])
    with hooks.over({"eye": visible}):
        assert not torch.allclose(llm(inputs_embeds=row).logits, before, atol=1e-3)
    assert torch.equal(llm(inputs_embeds=row).logits, before)


@pytest.mark.slow
def test_ranks_with_different_modalities_are_one_rank_and_resume(tiny_llm, tmp_path):
    """Rank 0 gets only images, rank 1 only sounds; both modalities speak by cross-attention."""
    kinds = ["image", "audio"]
    shards = write_pairs(tmp_path / "mixed", kinds, shards=1, per_shard=40)
    encoders = make_encoders(tmp_path / "encoders")
    more = {"optim__steps": 4, "data__shuffle": 0, "data__batch_size": 2, "run__save_every": 2, "run__samples": 2}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "stages:\n"
        "  - {name: zero1, engine: {zero: 1}, model: {llm: {checkpointing: none}}}\n"
        "  - {name: zero3, engine: {zero: 3}, model: {checkpoint: null, llm: {checkpointing: full}}}\n"
    )
    for kind in kinds:
        here = f"model__modalities__{kind}__projector"
        more |= {f"{here}__kind": "cross_attention", f"{here}__heads": 2, f"{here}__options__every": 1}
    two = settings(tiny_llm, encoders, tmp_path / "two", shards, kinds, **more)
    deepspeed(2, "launch/pretrain.py", recipe, *two)
    one = settings(tiny_llm, encoders, tmp_path / "one", shards, kinds, optim__gradient_accumulation=2, **more)
    pretrain_here(recipe, *one)
    runs = [(tmp_path / "two" / name, tmp_path / "one" / name) for name in ("zero1", "zero3")]
    for two, alone in runs:
        assert losses(two) == pytest.approx(losses(alone), rel=1e-5)
        saved = load_file(two / "checkpoints" / "latest" / "adapters" / "audio" / "model.safetensors")
        assert all(saved[f"bridges.{layer}.{gate}"].any() for layer in (0, 1) for gate in ("gate", "feed_forward_gate"))
    go_back(alone, 2)
    pretrain_here(recipe, *one, "stage=zero3")
    assert losses(two) == pytest.approx(losses(alone), rel=1e-5)
