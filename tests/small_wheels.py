"""Wheels of a few bytes, and import folders that look installed, for tests of what looks at packages."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path


def write_wheel(
    folder: Path, name: str, version: str, *, requires: Sequence[str] = (), files: Mapping[str, str] | None = None
) -> Path:
    """A pure-Python wheel with these requirements and files (by default a package that holds its version)."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    package = name.replace("-", "_")
    contents = dict(files if files is not None else {f"{package}/__init__.py": f"__version__ = {version!r}\n"})
    contents[f"{info}/METADATA"] = metadata(name, version, requires)
    contents[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    contents[f"{info}/RECORD"] = record(contents) + f"{info}/RECORD,,\n"
    path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in contents.items():
            archive.writestr(file, text)
    return path


def write_installed(site: Path, name: str, version: str, *, entry_points: str = "") -> None:
    """A dist-info folder, all that a look at versions and entry points reads."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(metadata(name, version, ()), encoding="utf-8")
    (info / "entry_points.txt").write_text(entry_points, encoding="utf-8")


def write_torch(site: Path, version: str, *, cuda: str | None, package: str = "torch") -> None:
    """torch or a companion of it, as its version.py tells its build."""
    write_installed(site, package, version)
    (site / package).mkdir()
    text = f"from typing import Optional\n__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\n"
    (site / package / "version.py").write_text(text, encoding="utf-8")


def metadata(name: str, version: str, requires: Sequence[str]) -> str:
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    extras = {requirement.split("extra ==")[1].strip(" '\"") for requirement in requires if "extra ==" in requirement}
    return "\n".join([*lines, *(f"Provides-Extra: {extra}" for extra in sorted(extras))]) + "\n"


def record(contents: Mapping[str, str]) -> str:
    """RECORD rows of these files."""
    rows = []
    for file, text in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        rows.append(f"{file},sha256={digest},{len(text.encode())}\n")
    return "".join(rows)
