"""One import name, wherever AnyMAL is: in the wheel, an editable install, a checkout with links or without.

Each has site-packages of its own, in a copy of the checkout; the libraries are those of this environment.
"""

import json
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from test_plugins import POINTS, PROJECTOR, SMELL, write_smells

import anymal
from distributions import distribution
from small_runs import ROOT, environment, losses, settings

FOLDERS = ("anymal", "adapters", "data_prep", "launch", "tests", "benchmarks")
ROOMS = ("adapters", "data_prep", "launch")
IMPORTS = (
    "import anymal.adapters, anymal.data_prep, anymal.launch\n"
    "print(anymal.adapters.__file__, anymal.data_prep.__file__, anymal.launch.__file__)\n"
)
FOREIGN = "THEIRS = True"


def run(*command: object, cwd: Path, path: Path | str = "") -> str:
    """What a command prints that sees no AnyMAL but that on `path`."""
    words, env = [*map(str, command)], environment() | {"PYTHONPATH": str(path)}
    done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=cwd, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what git knows, as far as it matters here: builds write beside their sources."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in FOLDERS:
        shutil.copytree(
            ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "written_by_*")
        )
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def empty(tmp_path) -> Path:
    """A folder to work in."""
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


@pytest.fixture
def python(tmp_path) -> Path:
    """The Python of an environment in which AnyMAL is not installed, and its libraries are."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    (site,) = (tmp_path / "venv").glob("lib/python3*/site-packages")
    for i, place in enumerate(sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})):
        (site / f"libraries{i}.pth").write_text(f"{place}\n")  # which does not follow the .pth files in there
    return tmp_path / "venv" / "bin" / "python"


@pytest.fixture(scope="module")
def built(checkout, tmp_path_factory) -> dict[str, Path]:
    """The sdist, the wheel that is made of it, and the wheel that is made of the checkout."""
    folder = tmp_path_factory.mktemp("built")
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir")
    said = run(*build, folder, checkout, cwd=folder)
    run(*build, folder / "direct", "--wheel", checkout, cwd=folder)
    assert "absent from the `packages`" not in said
    names = {"sdist": "*.tar.gz", "wheel": "*.whl", "direct": "direct/*.whl"}
    return {name: next(folder.glob(pattern)) for name, pattern in names.items()}


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        assert not any(stat.S_ISLNK(info.external_attr >> 16) for info in archive.infolist())
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.slow
def test_the_wheel_holds_all_that_programs_need_and_nothing_beside(built, checkout):
    wheel = contents(built["wheel"])
    own = {name for name in wheel if name.startswith("anymal/")}
    assert {name.split("/")[0] for name in set(wheel) - own} == {f"anymal-{anymal.__version__}.dist-info"}
    there = {str(path.relative_to(checkout)) for path in walk(checkout / "anymal")}
    assert own == there, "a file of a new kind has its pattern in setup.cfg"
    assert wheel == contents(built["direct"])
    with tarfile.open(built["sdist"]) as archive:
        members = archive.getmembers()
    assert not any(member.issym() or member.islnk() for member in members)
    assert {Path(member.name).parts[1] for member in members[1:]} <= {
        "anymal", "anymal.egg-info", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg",
    }  # fmt: skip


def walk(folder: Path) -> list[Path]:
    """The files below a folder, links to folders followed."""
    return [Path(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names]


@pytest.mark.slow
def test_the_wheel_works_from_an_empty_folder(built, empty, tiny_llm, tmp_path):
    """Beside AdapterHub's package, and a plug-in that uses that."""
    site = distribution(tmp_path / "site", "adapters", code=FOREIGN)
    code = "import adapters\nassert adapters.THEIRS\n" + SMELL + PROJECTOR
    distribution(site, "fragrance", code=code, entry_points=POINTS.format("fragrance"))
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, built["wheel"])
    run(*pip, cwd=empty)
    command = site / "bin" / "anymal"
    assert "demo-pretrain" in run(command, "--help", cwd=empty, path=site)
    assert run(command, "--version", cwd=empty, path=site) == f"anymal {anymal.__version__}\n"

    doctor = {row["what"]: row for row in json.loads(run(command, "doctor", "json=true", cwd=empty, path=site))}
    assert doctor["anymal"]["found"] == f"{anymal.__version__}, in {site / 'anymal'}, installed"
    assert doctor["adapters"]["state"] == "ok"

    shards = write_smells(tmp_path / "shards")
    given = settings(tiny_llm, tmp_path, empty / "run", str(shards), [], optim__steps=1, data__workers=1)
    given += ["model.modalities.smell.encoder=none", "model.modalities.smell.projector.kind=nose"]
    said = run(command, "pretrain", *given, cwd=empty, path=site)
    assert len(losses(empty / "run")) == 1 and str(ROOT) not in said
    assert [path.name for path in empty.iterdir()] == ["run"]


@pytest.mark.slow
def test_a_checkout_that_is_not_installed_and_one_that_is(checkout, python, empty):
    """From its folder, from elsewhere by PYTHONPATH, and then in editable form, beside AdapterHub's package."""
    found = [str(checkout / "anymal" / room / "__init__.py") for room in ROOMS]
    assert run(python, "-c", IMPORTS, cwd=checkout).split() == found
    assert run(python, "-c", IMPORTS, cwd=empty, path=checkout).split() == found
    assert "anymal doctor" in run(python, checkout / "launch" / "doctor.py", "--help", cwd=empty), "it needs neither"

    pip = ("-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", "-e")
    run(python, *pip, checkout, cwd=empty)
    (site,) = python.parents[1].glob("lib/python3*/site-packages")
    distribution(site, "adapters", code=FOREIGN)
    program = empty / "program.py"
    program.write_text(
        f"import adapters as foreign; assert foreign.THEIRS\n{IMPORTS}\n"
        "from anymal.data_prep.steps import worker_pool\n"
        "from anymal.launch.command import overview\n"
        "if __name__ == '__main__':\n"
        "    with worker_pool(1) as pool: assert pool.submit(overview).result() == overview()\n"
    )
    assert run(python, program, cwd=empty).splitlines()[0].split() == found, "also in workers, which are spawned"
    assert "--help lists" in run(python.with_name("anymal"), cwd=empty)
    assert "anymal mix" in run(python, checkout / "launch" / "mix.py", "--help", cwd=empty)
    assert "editable" in run(python, "-m", "anymal.doctor.examine", "anymal", cwd=empty)


@pytest.mark.slow
def test_a_checkout_without_links(checkout, python, empty, tmp_path):
    """As a zip of it is unpacked where there are none: with copies in their place."""
    copy = tmp_path / "copy"
    shutil.copytree(checkout, copy, symlinks=False)
    assert not any(path.is_symlink() for path in copy.rglob("*"))
    found = [str(copy / "anymal" / room / "__init__.py") for room in ROOMS]
    assert run(python, "-c", IMPORTS, cwd=copy).split() == found
    said = run(python, copy / "launch" / "pretrain.py", "--help", cwd=empty, path=copy)
    assert "anymal pretrain" in said and "Options of image" in said
