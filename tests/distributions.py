"""Packages as pip leaves them in a folder: for tests of what else is installed."""

from pathlib import Path


def distribution(
    folder: Path, name: str, version: str = "1.0", code: str = "", entry_points: str = "", *, package: bool = True
) -> Path:
    """Write a package and its metadata into a folder, which is returned.

    Args:
        folder: To be put on ``sys.path``.
        name: Of the distribution, and of the package in it.
        version: Of the distribution.
        code: Of the package.
        entry_points: The content of ``entry_points.txt``.
        package: Whether there is a package, and not the metadata alone.
    """
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)
    if package:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(code)
    return folder
