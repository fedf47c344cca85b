"""When spans are on, and how many are kept."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from oracle_server.errors import InvalidArgument
from oracle_server.rpc.spans import Spans, open_spans

CONSOLE = {"OTEL_TRACES_EXPORTER": "console"}


class Events:
    def __init__(self) -> None:
        self.said: list[tuple[str, dict[str, Any]]] = []

    def info(self, event: str, **values: Any) -> None:
        self.said.append((event, values))


def opened(environ: dict[str, str]) -> tuple[Spans | None, Events]:
    events = Events()
    return open_spans(environ, events), events


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_SERVICE_NAME": "x"},
        {**CONSOLE, "OTEL_SDK_DISABLED": "true"},
    ],
)
def test_without_an_exporter_in_the_environment_there_are_no_spans(environ: dict[str, str]) -> None:
    spans, events = opened(environ)
    assert (spans, events.said) == (None, [])


@pytest.mark.parametrize(
    ("environ", "sampler"),
    [
        (CONSOLE, "ParentBased{root:TraceIdRatioBased{0.01}"),
        ({**CONSOLE, "OTEL_TRACES_SAMPLER_ARG": "0.5"}, "ParentBased{root:TraceIdRatioBased{0.5}"),
    ],
)
def test_one_trace_of_a_hundred_is_kept_unless_the_environment_says_otherwise(
    environ: dict[str, str], sampler: str
) -> None:
    spans, events = opened(environ)
    assert spans is not None
    spans.close()
    ((event, values),) = events.said
    assert event == "spans on"
    assert values["sampler"].startswith(sampler)


def test_the_sampler_of_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    spans, events = opened({**CONSOLE, "OTEL_TRACES_SAMPLER": "always_off"})
    assert spans is not None
    spans.close()
    assert events.said[0][1]["sampler"] == "AlwaysOffSampler"


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        ({"OTEL_TRACES_EXPORTER": "jaegr"}, "there are .*console"),
        ({**CONSOLE, "OTEL_TRACES_SAMPLER_ARG": "2"}, "0 to 1"),
        ({**CONSOLE, "OTEL_TRACES_SAMPLER_ARG": "x"}, "0 to 1"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "smoke"}, "'smoke', which is not installed"),
    ],
)
def test_what_the_environment_cannot_have_is_told(environ: dict[str, str], sentence: str) -> None:
    with pytest.raises(InvalidArgument, match=sentence):
        opened(environ)


def test_without_the_extra_the_server_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("opentelemetry.sdk.resources", "opentelemetry.sdk.trace"):
        monkeypatch.setitem(sys.modules, name, None)
    spans, events = opened(CONSOLE)
    assert spans is None
    ((event, values),) = events.said
    assert event == "spans off"
    assert "step-oracle[otel]" in values["why"]
