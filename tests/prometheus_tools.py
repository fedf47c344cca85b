"""promtool and prometheus for tests: those on the PATH, else those of Debian's package, unpacked into the cache."""

from __future__ import annotations

from debian_packages import program


def promtool() -> str:
    """The path of promtool; skips the test where it is not to be had, and says why."""
    return program("promtool", "prometheus")


def prometheus() -> str:
    """The path of prometheus; skips as promtool does."""
    return program("prometheus", "prometheus")
