"""The profiler's own verbs, one file per group. Each reads options, calls one module and prints what came of it.

A file of verbs has `app`, a Typer with its commands (or with a named group of them), and stands in PARTS; groups of one
name become one. Heavy imports stay inside the functions, so that --help is quick.
"""

from __future__ import annotations

from profiler.commands import (
    captures,
    data,
    environment,
    experiments,
    fit,
    imports,
    lengths,
    packs,
    replay,
    report,
    rescale,
    silicon_points,
    synthesize,
    vllm_check,
)

PARTS = (
    synthesize.app,
    rescale.app,
    replay.app,
    report.app,
    experiments.app,
    silicon_points.app,
    fit.app,
    captures.app,
    data.app,
    environment.app,
    vllm_check.app,
    imports.app,
    packs.app,
    lengths.app,
)
