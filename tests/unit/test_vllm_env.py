from __future__ import annotations

from pathlib import Path

import pytest

from oracle_server import vllm_env
from small_wheels import record, write_installed, write_torch


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.33.0", (0, 33, 0)),
        ("0.18.1", (0, 18, 1)),
        ("0.9", (0, 9, 0)),
        ("0.33.0rc1+cpu", (0, 33, 0)),
        ("0.33.0.post1", (0, 33, 0)),
        ("dev", None),
        ("7", None),
    ],
)
def test_release_is_the_first_three_numbers(version: str, expected: tuple[int, int, int] | None) -> None:
    assert vllm_env.release(version) == expected


def test_a_build_is_read_without_importing_it(tmp_path: Path) -> None:
    write_torch(tmp_path, "2.13.0+cpu", cuda=None)
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('imported')\n")

    assert vllm_env.build_of([str(tmp_path)], "torch") == vllm_env.TorchBuild("2.13.0+cpu", None)


def test_a_local_version_tells_the_cuda_of_a_build_that_states_none(tmp_path: Path) -> None:
    (tmp_path / "torchaudio").mkdir()
    (tmp_path / "torchaudio" / "version.py").write_text("__version__ = '2.11.0+cu130'\n")

    assert vllm_env.build_of([str(tmp_path)], "torchaudio") == vllm_env.TorchBuild("2.11.0+cu130", "130")


def test_what_is_not_installed_has_no_build_and_no_version(tmp_path: Path) -> None:
    assert vllm_env.build_of([str(tmp_path)], "torch") is None
    assert vllm_env.distribution_version([str(tmp_path)], "torch") is None


@pytest.mark.parametrize(
    ("torch", "vision", "count"), [(None, None, 0), ("13.0", "13.0", 0), (None, "13.0", 1), ("13.0", None, 1)]
)
def test_builds_are_mixed_when_one_of_them_alone_is_for_cuda(
    tmp_path: Path, torch: str | None, vision: str | None, count: int
) -> None:
    write_torch(tmp_path, "2.13.0", cuda=torch)
    write_torch(tmp_path, "0.28.0", cuda=vision, package="torchvision")

    assert len(vllm_env.mixed_builds([str(tmp_path)])) == count


def test_the_first_import_path_wins(tmp_path: Path) -> None:
    write_installed(tmp_path / "first", "vllm", "0.18.1")
    write_installed(tmp_path / "second", "vllm", "0.33.0")

    assert vllm_env.distribution_version([str(tmp_path / "first"), str(tmp_path / "second")], "vllm") == "0.18.1"


def test_files_are_compared_with_the_record(tmp_path: Path) -> None:
    contents = {"vllm/a.py": "a\n", "vllm/b.py": "b\n", "vllm/c.py": "c\n", "vllm-1.dist-info/METADATA": "not compared"}
    (tmp_path / "vllm" / "__pycache__").mkdir(parents=True)
    for name, text in (("a.py", "a\n"), ("b.py", "B\n"), ("d.py", ""), ("__pycache__/a.pyc", "")):
        (tmp_path / "vllm" / name).write_text(text)

    report = vllm_env.check_files(tmp_path, record(contents), "vllm")

    assert report == vllm_env.FileReport(
        checked=3, changed=("vllm/b.py",), missing=("vllm/c.py",), added=("vllm/d.py",)
    )
    assert not report.identical
