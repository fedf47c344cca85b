"""Emulated engines differ from each other as engines do that know nothing of each other."""

from __future__ import annotations

import numpy as np

from performance.load.script import Message
from performance.servers import PERIOD_NS, SEQUENCES, SPREAD, script_engines

ENGINES, STEPS, SHARE = 1500, 250, 0.14


def sparse_sequences() -> list[list[Message]]:
    """Sequences in which one step in seven is sent, as with leases."""
    random = np.random.default_rng(1)
    chosen = [np.flatnonzero(random.random(SPREAD + STEPS) < SHARE) for _ in range(SEQUENCES)]
    return [[Message(int(i) * PERIOD_NS, int(i), 1, b"") for i in steps] for steps in chosen]


def dues(engine_count: int) -> list[list[int]]:
    """When the messages of each engine are due."""
    sequences = sparse_sequences()
    engines = script_engines([b""] * engine_count, sequences, STEPS)
    found = []
    for engine in engines:
        assert engine.count is not None
        messages = sequences[engine.sequence][engine.first : engine.first + engine.count]
        found.append([message.due_ns + engine.phase_ns for message in messages])
    return found


def test_as_many_messages_are_due_in_each_period_as_of_independent_engines() -> None:
    at = np.concatenate([np.array(due) for due in dues(ENGINES)])
    per_period = np.bincount(at // PERIOD_NS, minlength=STEPS)[1:STEPS]
    mean = ENGINES * SHARE
    assert abs(per_period.mean() - mean) < 0.05 * mean
    # Engines of 16 sequences that begin together have 10 times the deviation of independent ones.
    assert per_period.std() < 1.5 * np.sqrt(ENGINES * SHARE * (1 - SHARE))


def test_an_engine_sends_what_is_due_in_the_steps_of_its_own() -> None:
    sequences = sparse_sequences()
    engines = script_engines([b""] * 3 * SEQUENCES, sequences, STEPS)
    assert [engine.first for engine in engines[:SEQUENCES]] == [0] * SEQUENCES
    assert len({engine.first for engine in engines[::SEQUENCES]}) == 3
    for due in dues(3 * SEQUENCES):
        assert min(due) >= 0
        assert max(due) < (STEPS + 1) * PERIOD_NS
