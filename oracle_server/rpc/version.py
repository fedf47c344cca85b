"""Which release this is."""

from __future__ import annotations

from importlib import metadata


def package_version() -> str:
    """The version of the installed distribution; unknown where the code runs from a bare checkout."""
    try:
        return metadata.version("step-oracle")
    except metadata.PackageNotFoundError:
        return "unknown"
