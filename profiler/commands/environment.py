"""`doctor`, `health` and `vllm-install`, here for --help alone: `main` runs them before this tree exists."""

from __future__ import annotations

import typer

from profiler.cli import standard_library_main

app = typer.Typer()

_PASS_ALL = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command("doctor", context_settings=_PASS_ALL, add_help_option=False)
def doctor(context: typer.Context) -> None:
    """Say what this environment can do and what is missing."""
    raise typer.Exit(standard_library_main("doctor", list(context.args)))


@app.command("health", context_settings=_PASS_ALL, add_help_option=False)
def health(context: typer.Context) -> None:
    """Say whether a server serves: what probes run."""
    raise typer.Exit(standard_library_main("health", list(context.args)))


@app.command("vllm-install", context_settings=_PASS_ALL, add_help_option=False)
def vllm_install(context: typer.Context) -> None:
    """Make an environment that serves vLLM on a machine without a GPU."""
    raise typer.Exit(standard_library_main("vllm-install", list(context.args)))
