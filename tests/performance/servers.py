"""The servers under test, each on the server's core and a Unix socket, and the scripts of emulated engines for them."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from oracle_calls import EXPERIMENT, Calls, identity
from oracle_process import OracleProcess
from performance.load.client import LoadRun, run_load
from performance.load.leased import is_leasable, steps_sent
from performance.load.script import (
    RAW,
    STREAM,
    UNARY,
    Message,
    Script,
    ScriptEngine,
    raw_messages,
    stream_messages,
    unary_messages,
)
from performance.load.sequences import step_sequence
from performance.measure import LOAD_CORE, SERVER_CORE, on_core
from step_oracle.v1 import oracle_service_pb2 as service
from step_oracle.v1 import step_pb2

PERIOD_NS = 20_000_000
SEQUENCES = 16
# Engines are emulated from this step on at the earliest: those that hold leases have collected theirs by then.
WARM_STEPS = 2000
# Engines of one sequence begin at different steps of it, STRIDE apart and around at SPREAD: in step with each other
# they would send their rare messages in the same periods. A prime is a stride to 1,000 different beginnings.
SPREAD, STRIDE = 1000, 617
_FOLDER = Path(__file__).parent
_GOLDEN = 0.6180339887498949


@cache
def sequence(number: int, steps: int) -> tuple[step_pb2.StepRequest, ...]:
    """Steps of an emulated engine that plays `steps` of them, the warm-up and all beginnings included."""
    return tuple(step_sequence(WARM_STEPS + SPREAD + steps, seed=number))


def steps_of(number: int, steps: int) -> Sequence[step_pb2.StepRequest]:
    """The steps that are played by one engine or another."""
    return sequence(number, steps)[WARM_STEPS:]


class Ours:
    """Our server with a pack. Owns the process; use as a context manager."""

    def __init__(self, folder: Path, *, listen: Sequence[str] = (), arguments: Sequence[str] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.process = OracleProcess(folder / "state", listen=listen or (f"unix:{folder}/s",), arguments=arguments)
        self.attached: dict[tuple[str, str], int] = {}
        self._sent: dict[tuple[int, int], list[int]] = {}

    def __enter__(self) -> Ours:
        raise_file_limit()
        with on_core(SERVER_CORE):
            self.process.start()
        self.calls = Calls(self.process.target)
        return self

    def __exit__(self, *error: object) -> None:
        self.calls.__exit__(None, None, None)
        self.process.stop()

    @property
    def target(self) -> str:
        return self.process.target

    @property
    def pids(self) -> tuple[int, ...]:
        return (self.process.pid,)

    def opening(self, name: str, *, leases: bool = False, experiment: str = EXPERIMENT) -> service.StreamOpen:
        """What an engine opens its stream with; it attaches the first time."""
        engine = identity(name, experiment)
        known = self.attached.get((experiment, name))
        if known is None:
            known = self.attached[experiment, name] = self.calls.attach(engine).incarnation
        return service.StreamOpen(engine=engine, incarnation=known, leases=leases)

    def script(self, engines: int, steps: int, *, leases: bool = False, experiments: Sequence[str] = ()) -> Script:
        """`engines` emulated engines with `steps` steps each; spread over experiments where several are given."""
        messages = [self._messages(number, steps, leases) for number in range(min(engines, SEQUENCES))]
        names = experiments or (EXPERIMENT,)
        begins = []
        for i in range(engines):
            opening = self.opening(f"e{i}", leases=leases, experiment=names[i % len(names)])
            begins.append(service.StreamStepsRequest(open=opening).SerializeToString())
        return Script(STREAM, messages, script_engines(begins, messages, steps))

    def sent(self, number: int, steps: int) -> list[int]:
        """Positions in `sequence(number, steps)` of the steps that a shim with leases sends."""
        key = number, steps
        if key not in self._sent:
            opening = self.opening("leased", leases=True)
            self._sent[key] = steps_sent(self.calls.oracle, opening, sequence(number, steps))
        return self._sent[key]

    def lease_share(self, steps: int) -> tuple[float, float]:
        """Steps answered from leases, as a share of the leasable ones and of all."""
        sent = sum(i >= WARM_STEPS for n in range(SEQUENCES) for i in self.sent(n, steps))
        leasable = sum(is_leasable(step.shape) for n in range(SEQUENCES) for step in steps_of(n, steps))
        total = (SPREAD + steps) * SEQUENCES
        return (total - sent) / leasable, (total - sent) / total

    def _messages(self, number: int, steps: int, leases: bool) -> list[Message]:
        sent = [i - WARM_STEPS for i in self.sent(number, steps) if i >= WARM_STEPS] if leases else None
        return stream_messages(steps_of(number, steps), period_ns=PERIOD_NS, generation=1, sent=sent)


@contextmanager
def other_server(script: str, *arguments: str, target: str) -> Iterator[int]:
    """One of the servers beside this file; its process id."""
    command = [sys.executable, str(_FOLDER / script), *arguments, target]
    with on_core(SERVER_CORE):
        # As OracleProcess: Linux shares a core between sessions before it shares it between processes.
        process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n", f"{script} did not start"
            yield process.pid
        finally:
            process.kill()


def stream_script(engines: int, steps: int) -> Script:
    """Streams for a server that knows no engines."""
    messages = [
        stream_messages(steps_of(n, steps), period_ns=PERIOD_NS, generation=1) for n in range(min(engines, SEQUENCES))
    ]
    opening = service.StreamStepsRequest(open=service.StreamOpen(engine=identity("e"), incarnation=1))
    return Script(STREAM, messages, script_engines([opening.SerializeToString()] * engines, messages, steps))


def unary_script(engines: int, steps: int) -> Script:
    """SampleStep calls, one at a time per engine."""
    messages = [unary_messages(steps_of(n, steps), period_ns=PERIOD_NS) for n in range(min(engines, SEQUENCES))]
    begins = [service.SampleStepRequest(engine=identity(f"e{i}")).SerializeToString() for i in range(engines)]
    return Script(UNARY, messages, script_engines(begins, messages, steps))


def raw_script(engines: int, steps: int) -> Script:
    """Frames for the bare socket."""
    messages = [raw_messages(steps_of(n, steps), period_ns=PERIOD_NS) for n in range(min(engines, SEQUENCES))]
    return Script(RAW, messages, script_engines([b""] * engines, messages, steps))


def script_engines(begins: Sequence[bytes], sequences: Sequence[Sequence[Message]], steps: int) -> list[ScriptEngine]:
    """Engines of `steps` steps each, spread evenly over the period, the sequences and the beginnings in them.

    What an engine sends is cut out of the whole sequence, so it holds the leases, and has reported the counts, of one
    that has lived the steps before.
    """
    engines = []
    for i, begin in enumerate(begins):
        sequence, start = i % len(sequences), i // len(sequences) * STRIDE % SPREAD
        first, end = (
            bisect_left(sequences[sequence], step * PERIOD_NS, key=lambda message: message.due_ns)
            for step in (start, start + steps)
        )
        phase = int(i * _GOLDEN % 1 * PERIOD_NS) - start * PERIOD_NS
        engines.append(ScriptEngine(sequence, phase, begin, first, end - first))
    return engines


def play(script: Script, target: str, pids: Sequence[int], *, closed: bool = False, **options: float | bool) -> LoadRun:
    """Run the load on its core."""
    return run_load(script, target, closed=closed, core=LOAD_CORE, server_pids=pids, **options)  # type: ignore[arg-type]


def raise_file_limit() -> None:
    """A server and a generator of thousands of connections need as many files; children inherit the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def has_two_cores() -> bool:
    return len(os.sched_getaffinity(0)) > max(SERVER_CORE, LOAD_CORE)
