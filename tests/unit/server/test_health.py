"""`step-oracle health`: what it makes of an answer, and how long it tries."""

from __future__ import annotations

import pytest

from oracle_server.health import Health, main, wait

SERVING, LOADING = Health(answered=True, status="SERVING"), Health(answered=True, status="NOT_SERVING")
SILENT = Health(answered=False, status="UNAVAILABLE")


@pytest.mark.parametrize(("health", "ready", "alive"), [(SERVING, 0, 0), (LOADING, 1, 0), (SILENT, 3, 3)], ids=str)
def test_ready_and_alive_are_two_questions(health: Health, ready: int, alive: int) -> None:
    assert health.exit_status(alive_is_enough=False) == ready
    assert health.exit_status(alive_is_enough=True) == alive


class Script:
    """Answers in order, the last one for ever; sleeping moves its clock."""

    def __init__(self, *answers: Health) -> None:
        self.now = 0.0
        self.asked = 0
        self._answers = answers

    def ask(self) -> Health:
        self.asked += 1
        return self._answers[min(self.asked, len(self._answers)) - 1]

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def wait(self, seconds: float, *, alive_is_enough: bool = False) -> Health:
        return wait(self.ask, alive_is_enough=alive_is_enough, seconds=seconds, clock=self.clock, sleep=self.sleep)


def test_without_time_it_asks_once() -> None:
    script = Script(LOADING, SERVING)
    assert script.wait(0) == LOADING
    assert script.asked == 1


def test_it_waits_until_the_server_is_ready() -> None:
    script = Script(SILENT, SILENT, LOADING, SERVING)
    assert script.wait(10) == SERVING
    assert script.asked == 4
    assert script.now < 10


def test_it_gives_the_last_answer_when_the_time_is_over() -> None:
    script = Script(SILENT, LOADING)
    assert script.wait(2) == LOADING
    assert 2 <= script.now < 3


def test_alive_does_not_wait_for_ready() -> None:
    script = Script(LOADING, SERVING)
    assert script.wait(10, alive_is_enough=True) == LOADING


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--timeout", "-1"], "is not a number of seconds"),
        (["--wait", "inf"], "is not a number of seconds"),
        (["--service", "s" * 128], "at most 127 bytes"),
    ],
)
def test_bad_arguments_are_told(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == 2
    assert sentence in capsys.readouterr().err
