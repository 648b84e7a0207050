"""The command `anymal`: its overview, and the grammar that all programs share."""

import json
import re
import subprocess
import sys

import pytest

import anymal
from anymal.config.settings import RECIPES
from anymal.launch.command import COMMANDS
from small_runs import ROOT, environment


def test_the_overview_fits_a_screen(run_command, capsys):
    for words in ((), ("--help",), ("-h",)):
        assert run_command(*words) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) <= 24 and max(map(len, lines)) <= 100
    for name in COMMANDS:
        (line,) = (line for line in lines if line.startswith(f"  {name} "))
        assert line.removeprefix(f"  {name}").strip().endswith(".")
    assert all(recipe.stem in "\n".join(lines) for recipe in RECIPES.glob("*.yaml"))


def test_its_version_needs_no_installation(tmp_path):
    command = [sys.executable, "-S", "-m", "anymal.launch.command", "--version"]  # -S: nothing is installed
    env = environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"anymal {anymal.__version__}\n", "")


@pytest.mark.parametrize(
    ("word", "said"),
    [("pretrian", "did you mean pretrain?"), ("--verbose", "known are: pretrain, "), ("xyz", "known are:")],
)
def test_an_unknown_command_names_the_nearest(word, said, run_command, capsys):
    assert run_command(word, "a=b") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: '{word}' is no command; ") and said in error and error.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_that_shows_the_command_first(name, run_command, capsys):
    assert run_command(name, "--help") == 0
    said = capsys.readouterr().out
    assert said.split("\n")[2].startswith(f"    anymal {name}")
    assert "Settings:" in said or name == "doctor"
    lines = said.splitlines()
    for at, line in enumerate(lines):
        if setting := re.match(r" +(\S+)  \(.*(required|default .*)\)$", line):
            assert re.match(r" {6}\S", lines[at + 1]), f"{setting[1]} says nothing of what it is"


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "doctor"])
def test_every_command_names_an_unknown_setting(name, run_command, capsys):
    assert run_command(name, "sheds=1") == 2
    assert "sheds" in capsys.readouterr().err


def test_the_report_is_of_the_folder_that_is_named(run_command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_command("report", "nowhere") == 2
    assert "nowhere holds neither evaluation.json nor" in capsys.readouterr().err
    assert run_command("report") == 2
    assert "must be given: run" in capsys.readouterr().err
    stage = tmp_path / "runs" / "pretrain"
    stage.mkdir(parents=True)
    (stage / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    for word in ("runs", "run=runs"):
        assert run_command("report", word) == 0
        assert capsys.readouterr().out.strip() == "runs/report.html"
        (tmp_path / "runs" / "report.html").unlink()
    assert run_command("report", "runs", "runs") == 2
    assert "error: 'runs' is neither" in capsys.readouterr().err


def test_a_setting_that_is_missing_says_how_it_is_written(run_command, capsys):
    asked = "error: these settings have no default and must be given:"
    assert run_command("chat", "runs/demo/finetune") == 2  # its words are a prompt, also a folder's name
    assert capsys.readouterr().err == f"{asked} checkpoint (written checkpoint=…)\n"
    assert run_command("pretrain") == 2
    assert capsys.readouterr().err == f"{asked} model.llm.name (written model.llm.name=… or in a recipe, named first)\n"
    assert run_command("pretrain", "anymal-image-8b") == 2
    assert capsys.readouterr().err == f"{asked} data.shards (written data.shards=…)\n"


@pytest.mark.filterwarnings("default::FutureWarning")
def test_an_old_name_is_one_line(run_command, capsys):
    assert run_command("pretrain", "optim.accumulate=2") == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "warning: optim.accumulate=2: optim.accumulate is called optim.gradient_accumulation now"
    assert len(said) == 2 and said[1].startswith("error: ")


def test_ctrl_c_while_a_program_is_imported_leaves_no_traceback(run_command, capsys, tmp_path, monkeypatch):
    (tmp_path / "interrupted.py").write_text("raise KeyboardInterrupt\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(COMMANDS, "mix", "interrupted")
    assert run_command("mix") == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_a_recipe_that_is_not_there_hints_at_one_that_is(run_command, capsys):
    assert run_command("pretrain", "demo-pretrian") == 2
    assert capsys.readouterr().err == "error: there is no recipe demo-pretrian; did you mean demo-pretrain?\n"
