"""What is installed beside vLLM, read from the files of an environment without importing any of it.

`vllm_install` asks about the environment it builds and `doctor` about the one it runs in. Standard library only.
"""

from __future__ import annotations

import ast
import base64
import csv
import hashlib
import importlib.metadata
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# The oldest version whose Executor and Platform interfaces the shim serves.
OLDEST_VLLM = (0, 18, 1)
# The newest version the shim is tested with; newer ones are tried, with a warning.
NEWEST_TESTED_VLLM = (0, 33, 0)

# Packages compiled against one build of torch: a CUDA build of one of them beside a CPU torch fails at import
# ("operator torchvision::nms does not exist") and takes transformers.AutoProcessor with it.
TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True)
class TorchBuild:
    """A build of torch or of one of its companions. `cuda` is its CUDA version, None for a CPU build."""

    version: str
    cuda: str | None


@dataclass(frozen=True)
class FileReport:
    """How the files of a distribution compare with the RECORD of its wheel."""

    checked: int
    changed: tuple[str, ...]
    missing: tuple[str, ...]
    added: tuple[str, ...]

    @property
    def identical(self) -> bool:
        return not (self.changed or self.missing or self.added)


def release(version: str) -> tuple[int, int, int] | None:
    """The first three numbers of a version ("0.33.0rc1+cpu" gives (0, 33, 0)); None where it has no such form."""
    match = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?(?![\d])", version)
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else None


def dotted(numbers: tuple[int, int, int]) -> str:
    return ".".join(map(str, numbers))


def distribution(paths: Sequence[str], name: str) -> importlib.metadata.Distribution | None:
    """The installed distribution of this name on the given import paths, the first one as Python would find it."""
    return next(iter(importlib.metadata.distributions(name=name, path=list(paths))), None)


def distribution_version(paths: Sequence[str], name: str) -> str | None:
    found = distribution(paths, name)
    # A dist-info folder without METADATA is what an interrupted uninstall leaves behind; its version is None.
    return (found.metadata["Version"] or None) if found is not None else None


def build_of(paths: Sequence[str], package: str) -> TorchBuild | None:
    """The build of torch, torchvision, torchaudio or torchcodec that `import` would find; None where there is none.

    Reads the literals of the package's version.py; a local version label ("+cu130") decides where it has no `cuda`.
    """
    for path in paths:
        version_file = Path(path) / package / "version.py"
        if not version_file.is_file():
            continue
        literals = _literals(version_file.read_text(encoding="utf-8", errors="replace"))
        version = str(literals.get("__version__") or distribution_version(paths, package) or "unknown")
        cuda = literals.get("cuda")
        if cuda is None and (label := re.search(r"\+cu(\d+)", version)):
            cuda = label[1]
        return TorchBuild(version=version, cuda=None if cuda is None else str(cuda))
    return None


def mixed_builds(paths: Sequence[str]) -> tuple[str, ...]:
    """One sentence for every companion of torch that is built for other hardware than torch itself."""
    torch = build_of(paths, "torch")
    if torch is None:
        return ()
    sentences = []
    for name in TORCH_COMPANIONS:
        build = build_of(paths, name)
        if build is None or (build.cuda is None) == (torch.cuda is None):
            continue
        sentences.append(f"{name} {build.version} is {_hardware(build)}, torch {torch.version} is {_hardware(torch)}")
    return tuple(sentences)


def check_files(site: Path, record: str, package: str) -> FileReport:
    """Compare every file of `package` under `site` with a wheel's RECORD: sha256 of each, none missing, none added.

    Byte-compiled files are Python's own and do not count. Rows of other folders (scripts, dist-info) are left out: an
    installer writes those anew.
    """
    expected: dict[str, str] = {}
    for row in csv.reader(io.StringIO(record)):
        if row and row[0].startswith(f"{package}/") and not row[0].endswith(".pyc"):
            expected[row[0]] = row[1]
    changed, missing = [], []
    for name, digest in expected.items():
        file = site / name
        if not file.is_file():
            missing.append(name)
        elif digest != _record_digest(file):
            changed.append(name)
    present = {
        str(file.relative_to(site))
        for file in (site / package).rglob("*")
        if file.is_file() and file.suffix != ".pyc" and "__pycache__" not in file.parts
    }
    return FileReport(
        checked=len(expected),
        changed=tuple(sorted(changed)),
        missing=tuple(sorted(missing)),
        added=tuple(sorted(present - set(expected))),
    )


def _hardware(build: TorchBuild) -> str:
    return "a CPU build" if build.cuda is None else f"built for CUDA {build.cuda}"


def _literals(source: str) -> dict[str, object]:
    values: dict[str, object] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        if isinstance(value, ast.Constant):
            values.update({target.id: value.value for target in targets if isinstance(target, ast.Name)})
    return values


def _record_digest(file: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").digest()
    return "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
