"""Modalities and projectors of other distributions: installed as pip does it, found, trained, evaluated; or refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

import smell
from distributions import distribution
from small_runs import losses, settings

PROJECTOR = '''
from anymal.model.registry import ProjectorKind


@dataclass(kw_only=True)
class NoseOptions:
    """Settings."""

    gain: float = 1.0
    """What its output is multiplied by."""


class Nose(nn.Module):
    """A layer that a plug-in brings."""

    def __init__(self, config, options, fit):
        super().__init__()
        _, width = fit.only(config)
        self.tokens, self.gain = config.tokens, options.gain
        self.layer = nn.Linear(width, self.tokens * fit.llm_width)

    def forward(self, features):
        return self.gain * self.layer(features.mean(1)).unflatten(-1, (self.tokens, -1))


KIND = ProjectorKind(make=Nose, options=NoseOptions)
'''
POINTS = "[anymal.modalities]\nsmell = {0}:MODALITY\n[anymal.projectors]\nnose = {0}:KIND\n"
SMELL = Path(smell.__file__).read_text()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a distribution until the end of the test."""
    folder = tmp_path / "site-packages"
    monkeypatch.syspath_prepend(folder)
    modules = set(sys.modules)

    def install(name: str, code: str, entry_points: str) -> None:
        distribution(folder, name, code=code, entry_points=entry_points)

    yield install
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


def write_smells(folder: Path, *, questions: bool = False) -> Path:
    """A tar of readings of three receptors: roses, and what is none."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    with wds.TarWriter(str(folder / "000.tar")) as tar:
        for i in range(24):
            word = ("a rose", "a fish")[i % 2]
            reading = (rng.normal(size=3) + (3 if i % 2 else -3)).astype(np.float32).tobytes()
            asked = {"role": "user", "content": [{"type": "smell"}, {"type": "text", "text": "what is this?"}]}
            answer = {"role": "assistant", "content": word}
            said = (
                {"json": {"messages": [asked, answer], "options": ["a rose", "a fish"]}} if questions else {"txt": word}
            )
            tar.write({"__key__": f"s{i}", "smell": reading, **said})
    return folder


def test_a_plugin_trains_and_is_evaluated(install, run_command, tiny_llm, tmp_path, capsys):
    install("fragrance", SMELL + PROJECTOR, POINTS.format("fragrance"))
    assert run_command("pretrain", "--help") == 0
    said = capsys.readouterr().out
    assert "Options of smell (shard members ending in .smell):" in said and "smell.options.strength" in said
    assert "  nose: A layer that a plug-in brings." in said and "projector.options.gain" in said

    shards, test = write_smells(tmp_path / "train"), write_smells(tmp_path / "test", questions=True)
    own = {"encoder": "none", "options.strength": 2, "projector.kind": "nose", "projector.tokens": 2}
    own["projector.options.gain"] = 0.5
    given = settings(tiny_llm, tmp_path, tmp_path / "run", str(shards), [], optim__steps=8, data__workers=1)
    given += [f"model.modalities.smell.{name}={value}" for name, value in own.items()]
    assert run_command("pretrain", *given) == 0
    curve = losses(tmp_path / "run")
    assert len(curve) == 8 and curve[8] < curve[1]

    out = tmp_path / "out"
    given = [f"checkpoint={tmp_path / 'run'}", f"sets.smells={test}", f"out={out}", "workers=1", "max_new_tokens=2"]
    assert run_command("evaluate", *given) == 0
    (sets,) = json.loads((out / "evaluation.json").read_text())["precisions"].values()
    assert sets["smells"]["n"] == 24 and sets["smells"]["chance"] == 0.5
    assert list(out.rglob("*.smell")), "media are shown as they are"


def test_two_distributions_that_claim_one_name(install, run_command, capsys):
    for name in ("aroma", "bouquet"):
        install(name, SMELL, f"[anymal.modalities]\nsmell = {name}:MODALITY\n")
    assert run_command("estimate", "--help") == 2
    error = capsys.readouterr().err
    assert "of the distribution bouquet cannot be used: the name smell is taken, by aroma" in error


MODALITY_LIKE = "from dataclasses import replace\nfrom anymal.adapters import MODALITIES\n"


@pytest.mark.parametrize(
    ("code", "entry_points", "said"),
    [
        ("import nothing_of_the_kind", "{}:MODALITY", "ModuleNotFoundError: No module named 'nothing_of_the_kind'"),
        ("raise ValueError('one\\ntwo')", "{}:MODALITY", "ValueError: one two"),
        ("raise SystemExit('no licence')", "{}:MODALITY", "SystemExit: no licence"),
        ("", "{}:MODALITY", "AttributeError: module"),
        ("", "not a module!", ""),
        ("MODALITY = 'smell'", "{}:MODALITY", "it is a str; wanted is a anymal.modality.Modality"),
        ("MODALITY = replace(MODALITIES['imu'], name='taste')", "{}:MODALITY", "its modality is called 'taste'"),
        (
            "MODALITY = replace(MODALITIES['imu'], name='smell')",
            "{}:MODALITY",
            "members that end in .imu.npy are already of imu",
        ),
        (
            "MODALITY = replace(MODALITIES['imu'], name='smell', suffixes=('txt',))",
            "{}:MODALITY",
            "members that end in .txt are already of captions",
        ),
    ],
)
def test_a_broken_plugin_is_a_line_that_names_its_distribution(code, entry_points, said, install, run_command, capsys):
    install("broken_one", MODALITY_LIKE + code, f"[anymal.modalities]\nsmell = {entry_points.format('broken_one')}\n")
    assert run_command("pretrain", "demo-pretrain") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the plug-in smell = ") and error.count("\n") == 1
    assert "of the distribution broken_one cannot be used: " in error and said in error
    assert error.endswith("; mend it, or pip uninstall broken_one\n")


@pytest.mark.parametrize("name", ["image", "text"])
def test_a_name_that_is_taken(name, install, run_command, capsys):
    code = f"MODALITY = replace(MODALITIES['imu'], name={name!r}, suffixes=('smell',))"
    install("taker", MODALITY_LIKE + code, f"[anymal.modalities]\n{name} = taker:MODALITY\n")
    assert run_command("chat", "hello") == 2
    assert (
        f"of the distribution taker cannot be used: the name {name} is taken, by AnyMAL itself"
        in capsys.readouterr().err
    )


def test_projectors_are_checked_as_modalities_are(install, run_command, capsys):
    install("mapper", "KIND = 1", "[anymal.projectors]\nmlp = mapper:KIND\n")
    assert run_command("encode", "demo-pretrain") == 2
    assert (
        "mapper cannot be used: it is a int; wanted is a anymal.model.registry.ProjectorKind" in capsys.readouterr().err
    )


def test_programs_that_name_no_modality_mind_no_plugin(install, run_command, capsys):
    install("broken_two", "raise ValueError", "[anymal.modalities]\nsmell = broken_two:MODALITY\n")
    for name in ("mix", "report", "llava", "doctor"):
        assert run_command(name, "--help") == 0
