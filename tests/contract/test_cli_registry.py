"""`pack push` and `pack pull` against a real registry: outputs and exit statuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from builders import build_constant_pack
from registry_server import PASSWORD, USER, RegistryProcess

COMMAND = str(Path(sys.executable).with_name("step-oracle"))


def run(*arguments: object, **variables: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STEP_ORACLE_")}
    environment |= {f"STEP_ORACLE_{name.upper()}": str(value) for name, value in variables.items()}
    words = [COMMAND, "pack", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment)


def read(*arguments: object, **variables: object) -> Any:
    done = run(*arguments, "--json", **variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_pack_goes_there_and_comes_back_by_each_of_its_names(
    registry_process: RegistryProcess, pack_dirs: dict[str, Path], tmp_path: Path
) -> None:
    place = f"{registry_process.authority}/cli/packs"
    pushed = read("push", pack_dirs["composed"], f"{place}:h100")
    assert pushed["reference"] == f"{place}:{pushed['digest'].replace(':', '-')}"
    assert (pushed["alias"], pushed["warnings"]) == (f"{place}:h100", [])
    for i, name in enumerate((pushed["reference"], pushed["alias"], pushed["image"])):
        pulled = read("pull", name, "-o", tmp_path / "got" / str(i))
        assert (pulled["digest"], pulled["image"]) == (pushed["digest"], pushed["image"])
        assert contents(tmp_path / "got" / str(i)) == contents(pack_dirs["composed"])
    assert {path.name for path in (tmp_path / "got").iterdir()} == {"0", "1", "2"}
    done = run("push", pack_dirs["composed"], place)
    assert (done.returncode, done.stdout) == (0, f"{pushed['digest']}  {pushed['reference']}\n")


def test_exit_statuses_tell_what_went_wrong(
    registry_process: RegistryProcess, pack_dirs: dict[str, Path], tmp_path: Path
) -> None:
    place = f"{registry_process.authority}/cli/statuses"
    build_constant_pack(tmp_path / "bad")
    (tmp_path / "bad" / "operators.parquet").write_bytes(b"no parquet")
    for status, words, arguments in (
        (1, "operators.parquet", ("push", tmp_path / "bad", place)),
        (1, "is not there", ("pull", f"{place}:none", "-o", tmp_path / "got")),
        (2, "names no place in a registry", ("push", pack_dirs["composed"], "https://example.org/x")),
        (2, "names an image by its digest", ("push", pack_dirs["composed"], f"{place}@sha256:{64 * '0'}")),
        (2, "names no pack", ("pull", place, "-o", tmp_path / "got")),
        (2, "exists", ("pull", f"{place}:none", "-o", tmp_path)),
        (3, "cannot be asked", ("push", pack_dirs["composed"], "127.0.0.1:9/x")),
        (3, "cannot be asked", ("pull", "127.0.0.1:9/x:y", "-o", tmp_path / "got")),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (status, ""), (arguments, done.stderr)
        assert words in done.stderr, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"bad"}
    assert registry_process.tags("cli/statuses") == []


def test_credentials_come_from_a_file(tmp_path: Path, pack_dirs: dict[str, Path]) -> None:
    file = tmp_path / "credentials"
    file.write_text(f"{USER}:{PASSWORD}\n")
    with RegistryProcess(tmp_path / "registry", with_credentials=True) as process:
        place = f"{process.authority}/cli/packs"
        refused = run("push", pack_dirs["constant"], place)
        assert refused.returncode == 1
        assert "refuses the credentials" in refused.stderr
        for done in (
            run("push", pack_dirs["constant"], f"{place}:x", "--credentials", file),
            run("pull", f"{place}:x", "-o", tmp_path / "got", pack_registry_credentials=file),
        ):
            assert done.returncode == 0, done.stderr
            assert PASSWORD not in done.stdout + done.stderr
