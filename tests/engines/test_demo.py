"""The demo as `make demo` runs it, in a short form: what it prints, what it writes, what it leaves behind."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from environments import REPOSITORY

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PERIODS = ("before", "after")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The JSON and the printed text of one short run."""
    folder = tmp_path_factory.mktemp("demo")
    command = [*_command(), "--seconds", "20", "--json", str(folder / "figures.json")]
    done = subprocess.run(command, cwd=REPOSITORY, env=_variables(None), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "figures.json").read_text()), done.stdout


def test_no_request_fails_and_both_engines_are_answered_by_both_generations(demo: tuple[dict[str, Any], str]) -> None:
    figures, text = demo
    assert figures["failed_requests"] == 0
    assert sorted(figures["engines"]) == ["engine-0", "engine-1"]
    for engine in figures["engines"].values():
        assert engine["requests"] == 50
        counted = [engine[period]["requests"] for period in PERIODS]
        assert sum(counted) + engine["requests_across_the_swap"] == 50
        assert min(counted) > 0
        assert sorted(engine["steps_by_generation"]) == ["1", "2"]
        assert min(engine["steps_by_generation"].values()) > 50
        assert engine["replies_without_generation"] == 0
        assert not engine["generation_went_back"]
    assert "failed: 0" in text


def test_the_swap_moves_latencies_as_far_as_the_packs_say(demo: tuple[dict[str, Any], str]) -> None:
    """At least half of the way, on a logarithmic scale: a machine that cannot keep up adds to the quicker pack."""
    figures, _ = demo
    before, after = (figures[period]["costs"]["decode_step_p50_ms"] for period in PERIODS)
    assert after > 2 * before
    for engine in figures["engines"].values():
        for name in ("tpot_ms", "itl_ms", "decode_period_ms"):
            ratio = engine["after"][name]["p50"] / engine["before"][name]["p50"]
            assert ratio > math.sqrt(after / before), name


def test_no_token_comes_quicker_than_the_pack_allows(demo: tuple[dict[str, Any], str]) -> None:
    figures, _ = demo
    for engine in figures["engines"].values():
        for period in PERIODS:
            # 3 % for the batches of one engine against the packs' figure over both.
            assert engine[period]["decode_period_ms"]["p50"] > 0.97 * figures[period]["costs"]["decode_step_p50_ms"]
            assert engine[period]["ttft_ms"]["p50"] > engine[period]["decode_period_ms"]["p50"]


def test_every_figure_is_a_finite_number_and_every_reply_recomputes(demo: tuple[dict[str, Any], str]) -> None:
    figures, text = demo
    numbers = list(_numbers(figures))
    assert len(numbers) > 80
    assert all(math.isfinite(number) and number >= 0 for number in numbers)
    steps = sum(sum(engine["steps_by_generation"].values()) for engine in figures["engines"].values())
    assert (figures["replies_recomputed_equal"], figures["replies_recomputed_different"]) == (steps, 0)
    assert "pack says" in text
    assert max(map(len, text.splitlines())) <= 120


def test_an_interrupt_ends_everything_it_started() -> None:
    # vLLM's sockets lie below, and the path of a socket is short.
    with tempfile.TemporaryDirectory(prefix="demo-", dir="/tmp") as folder:
        demo = subprocess.Popen(
            _command(),
            cwd=REPOSITORY,
            env=_variables(Path(folder)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert demo.stdout is not None
        for line in demo.stdout:
            if "4/7" in line:
                break
        else:
            pytest.fail(f"the engines were never started: {demo.communicate()}")
        assert _processes_naming(folder)
        demo.send_signal(signal.SIGINT)
        _, said = demo.communicate(timeout=60)
        assert demo.returncode == 130, said
        assert _processes_naming(folder) == []
        assert list(Path(folder).iterdir()) == []


def _command() -> list[str]:
    return [sys.executable, "-m", "deploy.demo.demo"]


def _variables(temporary: Path | None) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": "tests"} | ({"TMPDIR": str(temporary)} if temporary else {})


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def _processes_naming(text: str) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in words:
            found.append(words)
    return found
