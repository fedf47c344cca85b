"""The policy is taken where the usual one is in force and the system allows it."""

from __future__ import annotations

import os

import pytest

from oracle_server.scheduling import scheduling, take_scheduling


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The policies that were set; none is."""
    found: list[int] = []
    monkeypatch.setattr(os, "sched_setscheduler", lambda pid, policy, param: found.append(policy))
    return found


@pytest.mark.parametrize(
    ("present", "wanted", "expected"),
    [
        (os.SCHED_OTHER, "batch", [os.SCHED_BATCH]),
        (os.SCHED_OTHER, "other", []),
        (os.SCHED_BATCH, "batch", []),
        (os.SCHED_RR, "batch", []),
    ],
)
def test_only_the_usual_policy_is_changed(
    present: int, wanted: str, expected: list[int], asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getscheduler", lambda pid: present)
    assert take_scheduling(wanted) == ""
    assert sorted(set(asked)) == expected


def test_a_refusal_is_told_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_getscheduler", lambda pid: os.SCHED_OTHER)
    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    assert "SCHED_BATCH is refused: [Errno 1] Operation not permitted" in take_scheduling("batch")


@pytest.mark.parametrize(
    ("policy", "name"), [(os.SCHED_OTHER, "other"), (os.SCHED_BATCH, "batch"), (os.SCHED_FIFO, str(os.SCHED_FIFO))]
)
def test_a_policy_has_a_name(policy: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getscheduler", lambda pid: policy)
    assert scheduling() == name
