"""Where `make lease-share` looks for its traces."""

from __future__ import annotations

from pathlib import Path

import pytest

from environments import REPOSITORY, measured_data
from performance.lease_share import parsed


def test_data_lie_beside_the_checkout_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("STEP_ORACLE_DATA", raising=False)
    assert measured_data() == REPOSITORY.parent / "shared" / "data"
    monkeypatch.setenv("STEP_ORACLE_DATA", str(tmp_path))
    assert parsed([]).data == measured_data() == tmp_path


def test_a_folder_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        parsed(["--data", str(tmp_path / "none")])
    assert f"no data in {tmp_path / 'none'}; give --data or set STEP_ORACLE_DATA" in capsys.readouterr().err
