"""`step-oracle doctor`: what keeps an engine on this machine from being emulated, and how to mend it.

Runs from the bare core: the standard library, and grpc where it is installed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from oracle_server import doctor_install, doctor_oracle
from oracle_server.finding import Finding, ok, warning

# Linux: prctl(PR_GET_TIMERSLACK) answers in nanoseconds.
_PR_GET_TIMERSLACK = 30
# The default is 50 us; a container or service manager that raises it past this delays every deadline visibly.
TIMER_SLACK_LIMIT_NS = 1_000_000
# Clock sources whose every reading is a slow device access.
SLOW_CLOCK_SOURCES = ("acpi_pm", "hpet", "jiffies")


def main(argv: Sequence[str]) -> int:
    """Print one line per check; 0: no problem (warnings may be), 1: problems, 2: bad arguments."""
    parser = argparse.ArgumentParser(prog="step-oracle doctor", description="Check that engines here can be emulated.")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--model", type=Path, metavar="DIR", help="model folder to compare with the experiment's pack")
    parser.add_argument("--timeout", type=float, default=3.0, metavar="SECONDS", help="for each call of the oracle (3)")
    arguments = parser.parse_args(list(argv))
    findings = list(examine(doctor_install.this_host(), arguments.model, arguments.timeout))
    problems = sum(finding.status == "problem" for finding in findings)
    if arguments.json:
        print(json.dumps({"ok": problems == 0, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        _print(findings)
    return 1 if problems else 0


def examine(host: doctor_install.Host, model: Path | None, timeout_seconds: float) -> Iterator[Finding]:
    """Every check in the order a start of an engine meets them."""
    yield from doctor_install.examine(host)
    yield from host_clock()
    yield from doctor_oracle.examine(host, model, timeout_seconds)


def host_clock() -> Iterator[Finding]:
    """How finely this machine can hold a deadline."""
    resolution = time.get_clock_info("monotonic").resolution
    source_file = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    source = source_file.read_text(encoding="utf-8").strip() if source_file.exists() else "unknown"
    if resolution > 1e-6 or source in SLOW_CLOCK_SOURCES:
        mend = "choose a fast clock source of the kernel, such as tsc (boot option clocksource=tsc)"
        yield warning("clock", f"source {source}, resolution {resolution * 1e9:.0f} ns: deadlines are coarse", mend)
    else:
        yield ok("clock", f"source {source}, resolution {resolution * 1e9:.0f} ns")
    yield timer_slack(_timer_slack_ns())


def timer_slack(slack_ns: int | None) -> Finding:
    """Whether a sleep may be late by more than a deadline allows; the shim lowers the slack of its own process."""
    if slack_ns is None:
        return ok("timer slack", "unknown on this platform")
    if slack_ns > TIMER_SLACK_LIMIT_NS:
        mend = "start engines outside the service or container setting that raises it (systemd: TimerSlackNSec=)"
        return warning("timer slack", f"{slack_ns / 1e6:.1f} ms: sleeps end late", mend)
    return ok("timer slack", f"{slack_ns / 1e3:.0f} us (the shim lowers it in the engine)")


def _timer_slack_ns() -> int | None:
    if not sys.platform.startswith("linux"):
        return None
    slack = int(ctypes.CDLL(None).prctl(_PR_GET_TIMERSLACK, 0, 0, 0, 0))
    return slack if slack >= 0 else None


def _print(findings: list[Finding]) -> None:
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    paint = {"ok": "\033[32m", "warning": "\033[33m", "problem": "\033[31m"}
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        status = f"{finding.status:<7}"
        if colour:
            status = f"{paint[finding.status]}{status}\033[0m"
        print(f"{status}  {finding.check:<{width}}  {finding.message}")
        if finding.mend:
            print(f"{'':7}  {'':<{width}}  -> {finding.mend}")
    counts = {status: sum(finding.status == status for finding in findings) for status in paint}
    print(f"{counts['problem']} problem(s), {counts['warning']} warning(s), {counts['ok']} ok")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
