"""How server CPU per message grows with engines, packs, samples per pack and experiments; no leases."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from performance.measure import Spread, interleaved
from performance.packs import build_large_sampled_pack, build_leasable_pack
from performance.servers import Ours, play

ENGINES = (1, 16, 64, 256)
PACKS = (1, 8, 32)
SAMPLES = (10_000, 100_000, 276_000, 1_000_000)
_BASE = 64


def measure(folder: Path, *, rounds: int, quick: bool) -> dict[str, Any]:
    """us per message of each size; one experiment per pack, which is also the growth in experiments."""
    messages = 6_000 if quick else 20_000
    with ExitStack() as stack:
        measures: dict[str, Callable[[], float]] = {}

        def add(name: str, ours: Ours, engines: int, experiments: list[str]) -> None:
            steps = max(50, messages // engines) if engines > 1 else messages // 4
            script = ours.script(engines, steps, experiments=experiments)

            def run() -> float:
                done = play(script, ours.target, ours.pids, closed=True)
                return done.server_cpu_ns / done.steps / 1e3

            measures[name] = run

        one = stack.enter_context(Ours(folder / "engines"))
        build_leasable_pack(folder / "pack-1")
        one.calls.create(one.calls.upload(folder / "pack-1"))
        for engines in ENGINES[::2] if quick else ENGINES:
            add(f"{engines} engines" if engines > 1 else "1 engine", one, engines, [])

        many = stack.enter_context(Ours(folder / "packs"))
        names = []
        counts = PACKS[:2] if quick else PACKS
        for number in range(max(counts)):
            build_leasable_pack(folder / f"packs-{number}", seed=number)
            digest = many.calls.upload(folder / f"packs-{number}")
            names.append(str(many.calls.create(digest, f"x{number}").name))
        same = [str(many.calls.create(digest, f"same{number}").name) for number in range(max(counts))]
        for count in counts:
            add(f"packs: {count}, each in an experiment", many, _BASE, names[:count])
            add(f"experiments: {count} of one pack", many, _BASE, same[:count])

        for samples in SAMPLES[::2] if quick else SAMPLES:
            sized = stack.enter_context(Ours(folder / f"samples-{samples}"))
            build_large_sampled_pack(folder / f"samples-pack-{samples}", samples)
            sized.calls.create(sized.calls.upload(folder / f"samples-pack-{samples}"))
            add(f"{samples:,} samples in the pack", sized, _BASE, [])
        found = interleaved(rounds, measures)
    return {"us_per_message": {name: Spread.of(values) for name, values in found.items()}}
