"""The unit: systemd accepts it, rates it, and runs it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import booted_systemd
from booted_systemd import BootedSystemd
from builders import build_constant_pack
from deploy_tools import DEPLOY
from oracle_calls import Calls, decode
from oracle_server.config import read_config

FOLDER = DEPLOY / "systemd"
UNIT = FOLDER / "step-oracle.service"
DROP_INS = ("group", "fleet")
# systemd-analyze's scale goes from 0 to 10; below 2 it says OK.
EXPOSURE_LIMIT = 1.5


@pytest.fixture(scope="module", autouse=True)
def systemd() -> None:
    """systemd's programs; Debian's package is installed where they are missing and that is possible."""
    if shutil.which("systemd-analyze"):
        return
    if shutil.which("apt-get") is None:
        pytest.skip("systemd-analyze is missing, and apt-get too")
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "systemd"]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"systemd-analyze is missing and cannot be installed: {done.stderr.strip()[-200:]}")


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """systemd-analyze."""
    return subprocess.run(["systemd-analyze", *map(str, arguments)], capture_output=True, text=True)


def setting(name: str) -> str:
    """The last value of a setting of the unit."""
    values: list[str] = re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)
    return values[-1]


def settings_file() -> dict[str, str]:
    """The variables of the environment file."""
    lines = (FOLDER / "step-oracle.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("drop_in", ["", *DROP_INS])
def test_systemd_accepts_the_unit(drop_in: str, tmp_path: Path) -> None:
    program = tmp_path / "step-oracle"
    program.symlink_to("/bin/true")
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/step-oracle/bin/step-oracle", str(program)))
    if drop_in:
        folder = tmp_path / f"{UNIT.name}.d"
        folder.mkdir()
        shutil.copy(FOLDER / f"{drop_in}.conf", folder)
    done = analyze("verify", "--man=no", unit)
    assert (done.returncode, done.stderr) == (0, "")


def test_systemd_sees_a_fault(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("ProtectSystem=strict", "ProtectSystm=strict"))
    assert "ProtectSystm" in analyze("verify", "--man=no", unit).stderr


def test_the_unit_exposes_little() -> None:
    done = analyze("security", "--offline=yes", f"--threshold={EXPOSURE_LIMIT * 10:.0f}", UNIT)
    (exposure,) = re.findall(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    print(f"exposure level {exposure}, allowed {EXPOSURE_LIMIT}")
    assert done.returncode == 0
    assert float(exposure) <= EXPOSURE_LIMIT


def test_the_environment_file_is_taken() -> None:
    config = read_config(settings_file())
    assert config.listen == ("127.0.0.1:8470", "unix:/run/step-oracle/oracle.sock")
    assert setting("RuntimeDirectory") == "step-oracle"


def test_systemd_waits_longer_than_the_drain_can_take() -> None:
    # 9 seconds is the longest drain the configuration allows.
    assert float(setting("TimeoutStopSec")) >= 9 + 5


@pytest.mark.slow
def test_the_unit_runs_serves_steps_and_stops_cleanly(installed: Path, tmp_path: Path) -> None:
    if reason := booted_systemd.missing():
        pytest.skip(reason)
    units = tmp_path / "units"
    units.mkdir()
    shutil.copy(UNIT, units)
    build_constant_pack(tmp_path / "pack", latency_ns=12_345_678)
    variables = settings_file() | {
        # Other servers may run on this machine, whose network is shared.
        "STEP_ORACLE_LISTEN": "127.0.0.1:0,unix:/run/step-oracle/oracle.sock",
        "STEP_ORACLE_METRICS": "127.0.0.1:0",
    }
    with BootedSystemd(tmp_path, bin_folder=installed, units=units, variables=variables) as systemd:
        started = systemd.systemctl("start", "step-oracle")
        log = systemd.run("journalctl", "--no-pager", "-u", "step-oracle").stdout
        assert started.returncode == 0, log
        shown = _properties(systemd, "ActiveState", "StatusText", "NRestarts")
        assert shown["ActiveState"] == "active"
        assert re.fullmatch(r"ready at 127\.0\.0\.1:\d+, unix:/run/step-oracle/oracle\.sock", shown["StatusText"])
        assert shown["NRestarts"] == "0"

        with Calls(f"unix:{systemd.root}/run/step-oracle/oracle.sock") as calls:
            # The pack is checked in a child process that limits itself, under the unit's filter of system calls.
            calls.create(calls.upload(tmp_path / "pack"))
            stream = calls.join("engine-0")
            assert [r.latency_ns[0] for i in range(50) for r in stream.ask(decode(i))] == [12_345_678] * 50
            stream.close()
        owner = (systemd.root / "var/lib/private/step-oracle/oracle.db").stat()
        assert owner.st_uid not in (0, 65534)
        assert owner.st_mode & 0o077 == 0

        assert systemd.systemctl("stop", "step-oracle").returncode == 0
        assert _properties(systemd, "ActiveState") == {"ActiveState": "inactive"}
        log = systemd.run("journalctl", "--no-pager", "-u", "step-oracle").stdout
        assert '"event": "drained"' in log
        # What systemd says of status 0; of any other it says "Failed with result".
        assert "step-oracle.service: Deactivated successfully." in log

        # What was stored is there after a restart; and now the socket is the group's.
        _drop_in(systemd, "group")
        assert systemd.run("groupadd", "--system", "step-oracle-engines").returncode == 0
        assert systemd.systemctl("start", "step-oracle").returncode == 0
        group = int(systemd.run("getent", "group", "step-oracle-engines").stdout.split(":")[2])
        socket = (systemd.root / "run/step-oracle/oracle.sock").stat()
        assert (socket.st_gid, socket.st_mode & 0o777) == (group, 0o770)
        with Calls(f"unix:{systemd.root}/run/step-oracle/oracle.sock") as calls:
            assert len(calls.join("engine-0").ask(decode(0))) == 1


def _drop_in(systemd: BootedSystemd, name: str) -> None:
    folder = systemd.root / "etc/systemd/system" / f"{UNIT.name}.d"
    folder.mkdir()
    shutil.copy(FOLDER / f"{name}.conf", folder)
    assert systemd.systemctl("daemon-reload").returncode == 0


def _properties(systemd: BootedSystemd, *names: str) -> dict[str, str]:
    shown = systemd.systemctl("show", "step-oracle", *(f"--property={name}" for name in names)).stdout
    return dict(line.split("=", 1) for line in shown.splitlines())
