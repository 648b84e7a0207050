"""What holds all over the house. Which room may import which is in .importlinter, for ``make check``."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from dataclasses import fields, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import get_type_hints

import pytest

from anymal.config.command_line import describe, field_docs
from anymal.config.schema import Config
from anymal.config.stages import Recipe, load_stages
from anymal.errors import UserError
from anymal.launch.command import COMMANDS

ROOT = Path(__file__).parent.parent
CORE = ROOT / "anymal"
ABOVE = ("adapters", "data_prep", "launch")  # linked into the core's folder, for one import name


def test_the_core_names_no_modality():
    from anymal.adapters import MODALITIES

    words = re.compile(rf"""["']({"|".join(MODALITIES)})["']""")
    for path in (path for path in CORE.rglob("*.py") if path.relative_to(CORE).parts[0] not in ABOVE):
        code = re.sub(r'"""[\s\S]*?"""', "", path.read_text())
        assert not words.search(code), f"{path.name}: {words.search(code)}"


def test_heavy_libraries_are_imported_where_they_are_used():
    program = (
        "import sys, anymal.launch.registry; print(*[m for m in ('av', 'torchaudio', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("recipe", sorted((ROOT / "launch" / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_loads(recipe):
    left_open = [
        name for name in ("data.shards", "model.checkpoint") if f"{name.split('.')[1]}: ???" in recipe.read_text()
    ]
    for name in left_open:  # forgotten, it is an error, not a run from scratch
        others = [f"{other}=x" for other in left_open if other != name]
        with pytest.raises(UserError, match=f"must be given: {name}"):
            load_stages(Recipe, recipe, others)
    for config in load_stages(Recipe, recipe, [f"{name}=x" for name in left_open]):
        assert config.model.llm.name and config.model.modalities
    assert recipe.read_text().startswith("#"), "a recipe says in its head what it is"


def settings(cls: type, prefix: str = "") -> list[str]:
    names = []
    for f in fields(cls):
        hint = get_type_hints(cls)[f.name]
        inner = next((a for a in getattr(hint, "__args__", ()) if is_dataclass(a)), None)
        if is_dataclass(hint):
            names += settings(hint, f"{prefix}{f.name}.")
        elif inner:
            names += settings(inner, f"{prefix}{f.name}.NAME.")
        else:
            names.append(prefix + f.name)
            assert field_docs(cls).get(f.name), f"{cls.__name__}.{f.name} has no docstring"
    return names


def test_help_lists_every_setting_with_its_meaning():
    text = "\n".join(describe(Config))
    for name in settings(Config):
        assert f"  {name}  (" in text


def commands(page: Path) -> list[list[str]]:
    """The words of every command of ours on a page, in blocks and in sentences, options left out."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"^\s+(?:DS_ACCELERATOR=\w+ )?((?:python|deepspeed|anymal) .*)$", text, flags=re.MULTILINE)
    lines += re.findall(r"`[^`\n]*?((?:python|deepspeed|anymal) [^`\n]+)`", text)
    return [[word for word in shlex.split(line, comments=True) if not word.startswith("-")] for line in lines]


@pytest.mark.parametrize("page", ["README.md", "docs/running.md", "docs/data.md"])
def test_every_command_of_a_page_names_a_program_and_settings_that_exist(page):
    known, found = set(settings(Config)), commands(ROOT / page)
    assert len(found) >= 3
    for words in found:
        if words[0] != "anymal":  # what python and deepspeed start
            at = next(i for i, word in enumerate(words) if word.endswith(".py"))
            assert (ROOT / words[at]).is_file(), words
            name, after = Path(words[at]).stem, words[at + 1 :]
        elif len(words) > 1 and words[1] != "COMMAND":
            name, after = words[1], words[2:]
            assert name in COMMANDS, words
        else:
            continue
        assert all((ROOT / word).is_file() for word in after if word.endswith(".yaml") and word != "RECIPE.yaml"), words
        if name in ("pretrain", "finetune"):
            names = {word.split("=")[0] for word in after if "=" in word}
            names = {re.sub(r"(modalities|datasets)\.\w+", r"\1.NAME", name) for name in names}
            assert names <= known, names - known


def test_every_link_in_the_documents_leads_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link.partition("#")[0]).exists(), f"{page.name}: {link}"


def test_the_page_of_a_room_names_every_file_in_it():
    entry_points = {module.rpartition(".")[2] for module in COMMANDS.values() if module.startswith("anymal.launch.")}
    for page in [page for folder in ("anymal", *ABOVE) for page in (ROOT / folder).rglob("__init__.py")]:
        text = ast.get_docstring(ast.parse(page.read_text())) or ""
        files = {path.stem for path in page.parent.glob("*.py")} - {"__init__"}
        rooms = {path.parent.name for path in page.parent.glob("*/__init__.py")}
        for name in (files | rooms) - (entry_points if page.parent.name == "launch" else set()):
            assert re.search(rf"`{name}[`./]|^ +{name}  ", text, flags=re.MULTILINE), f"{page} lacks {name}"


def test_the_trip_of_a_sample_names_functions_that_exist():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\|[^|]*\| `([\w/]+)\.py` \|(.*)\|$", page, flags=re.MULTILINE)
    assert rows[0][0] == "data/stream" and len(rows) > 20
    for file, functions in rows:
        module = importlib.import_module(f"anymal.{file.replace('/', '.')}")
        for name in re.findall(r"`([\w.]+)`", functions):
            if name != "data.workers":
                attrgetter(name)(module)


def resolve(name: str) -> None:
    """Import as much of a dotted name as is a module, and look up the rest; of a field, its annotation will do."""
    names = name.split(".")
    for end in range(len(names), 0, -1):
        try:
            there = importlib.import_module(".".join(names[:end]))
        except ModuleNotFoundError:
            continue
        for attribute in names[end:]:
            annotations = getattr(there, "__annotations__", {})
            there = annotations[attribute] if attribute in annotations else getattr(there, attribute)
        return


def test_what_docstrings_and_documents_refer_to_is_there():
    history = ("CHANGELOG.md", "log.md")
    no_code = {"anymal.index.json", "anymal.modalities", "anymal.projectors"}  # a file, and entry points
    folders = [CORE, *(ROOT / name for name in (*ABOVE, "docs", "benchmarks")), ROOT / "tests"]
    pages = [*ROOT.glob("*.md"), *(path for folder in folders for path in folder.rglob("*.*"))]
    pages = [page for page in pages if page.suffix in (".py", ".md") and "written_by_0_1" not in page.parts]
    for page in (page for page in pages if page.name not in history):
        for name in set(re.findall(r"`(anymal(?:\.\w+)+)`", page.read_text())) - no_code:
            try:
                resolve(name)
            except (AttributeError, ImportError) as error:
                raise AssertionError(f"{page.relative_to(ROOT)}: {name}") from error


def test_benchmarks_find_what_they_import_wherever_they_are_started(tmp_path):
    names = [path.stem for path in (ROOT / "benchmarks").glob("*.py")]
    program = f"import sys; sys.path[0] = {str(ROOT / 'benchmarks')!r}; import anymal, {', '.join(names)}"
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
