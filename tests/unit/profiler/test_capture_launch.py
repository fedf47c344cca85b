"""How an engine is told to be captured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import captures
from oracle_server.errors import InvalidArgument
from profiler.capture import capture_arguments, capture_command
from profiler.capture.engine import CapturedEngine
from profiler.capture.launch import CAPTURE, SCHEDULER, WORKER, CaptureCommand

FLAGS = (
    *("--worker-cls", "profiler.capture.worker.CaptureWorker"),
    *("--scheduler-cls", "profiler.capture.scheduler.capture_scheduler"),
)


def test_two_flags_and_one_variable_are_added(tmp_path: Path) -> None:
    command = capture_command(["vllm", "serve", "m", "-tp", "2"], tmp_path, {"PATH": "/bin"})

    assert command.arguments == ("vllm", "serve", "m", "-tp", "2", *FLAGS)
    assert command.environment == {"PATH": "/bin", CAPTURE: str(tmp_path / "run-001")}
    assert (tmp_path / "run-001").is_dir()


def test_every_start_has_a_run_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "run-009").mkdir()

    assert capture_command(["vllm"], tmp_path, {}).run.name == "run-010"
    assert capture_command(["vllm"], tmp_path, {}).run.name == "run-011"


@pytest.mark.parametrize(
    "given", [["--worker-cls", "my.Worker"], ["--worker-cls=my.Worker"], ["--worker_cls", "my.Worker"]]
)
def test_a_worker_of_the_users_own_is_the_one_observed(tmp_path: Path, given: list[str]) -> None:
    command = capture_command(["vllm", *given, "serve"], tmp_path, {})

    assert command.arguments == ("vllm", "serve", *FLAGS)
    assert command.environment[WORKER] == "my.Worker"
    assert SCHEDULER not in command.environment


def test_an_emulated_engine_is_not_captured(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="unset it"):
        capture_command(["vllm"], tmp_path, {"STEP_ORACLE_TARGET": "127.0.0.1:8470"})
    assert not list(tmp_path.iterdir())


def test_nothing_to_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="-- vllm serve MODEL"):
        capture_command([], tmp_path, {})


def test_an_engine_of_this_process_gets_keyword_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CAPTURE, "")

    assert capture_arguments(tmp_path) == {"worker_cls": FLAGS[1], "scheduler_cls": FLAGS[3]}


def test_a_command_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="no-such-vllm does not start"):
        CapturedEngine(CaptureCommand(("no-such-vllm",), {"PATH": "/nowhere"}, tmp_path))


@pytest.mark.parametrize(
    ("flags", "url"),
    [
        ((), "http://127.0.0.1:8000"),
        (("--host", "::", "--port=81"), "http://127.0.0.1:81"),
        (("--host=127.0.0.2",), "http://127.0.0.2:8000"),
    ],
)
def test_the_engines_address_is_read_from_its_command(tmp_path: Path, flags: tuple[str, ...], url: str) -> None:
    command = (sys.executable, "-c", "pass", *flags)
    with CapturedEngine(CaptureCommand(command, {}, tmp_path)) as engine:
        assert engine.base_url == url
        assert engine.wait() == 0
        assert not engine.wait_ready(10.0)


def test_a_capture_that_is_told_to_end_ends_its_engine(tmp_path: Path) -> None:
    engine = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    command = [sys.executable, "-m", "profiler.cli", "capture", "-o", str(tmp_path), "--", sys.executable, "-c", engine]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as capture:
        assert capture.stdout is not None
        assert "capturing into" in capture.stdout.readline()
        pid = int(capture.stdout.readline())
        capture.terminate()
        _, said = capture.communicate(timeout=120)

    assert not Path(f"/proc/{pid}").exists()
    assert capture.returncode == 1
    assert "the engine never started" in said


def test_an_engine_that_ends_by_itself_is_told_after_what_it_has_left(tmp_path: Path) -> None:
    """A stand-in that leaves a capture of five steps and crashes."""
    captures.write_run(tmp_path / "made", captures.steps(5))
    engine = (
        "import os, shutil, sys; "
        f"shutil.copytree({str(tmp_path / 'made' / 'run-001')!r}, os.environ['{CAPTURE}'], dirs_exist_ok=True); "
        "sys.exit(7)"
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "profiler.cli", "capture", "-o", str(tmp_path / "capture")),
            *("--", sys.executable, "-c", engine),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 1
    assert "5 steps" in done.stdout
    assert "ended by itself with 7" in done.stderr


def test_the_command_line_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    def capture(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "profiler.cli", "capture", *arguments], capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stderr

    assert capture("-o", str(tmp_path))[0] == 2
    assert "nothing to capture" in capture("-o", str(tmp_path))[1]
    assert capture("-o", str(tmp_path), "--minutes", "0", "--", "vllm")[0] == 2
    assert capture("-o", str(tmp_path), "--", sys.executable, "-c", "import sys; sys.exit(3)")[0] == 1
