"""What shadow packs would have answered, beside what was answered: exact sums by engine and by region of steps."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping

import msgspec

from oracle_server.errors import GenerationNotFound

KEPT_GENERATIONS = 8
MAX_ENGINES = 4096
# All engines beyond that number.
OTHERS = "(others)"
# Upper bounds of the differences as shares of the answered latency, in %; behind them everything else.
BOUNDS_PERCENT = (1, 2, 5, 10, 20, 50, 100)

# (Whether it has prefill tokens, support of the answer, support of the shadow's).
Region = tuple[bool, int, int]


class Differences(msgspec.Struct):
    """Of the steps of one region. A difference is the shadow's latency less the answered one, in nanoseconds."""

    steps: int = 0
    latency_ns: int = 0
    shadow_latency_ns: int = 0
    absolute_difference_ns: int = 0
    min_difference_ns: int = 0
    max_difference_ns: int = 0
    longer_steps: int = 0
    shorter_steps: int = 0
    relative_buckets: list[int] = msgspec.field(default_factory=lambda: [0] * (len(BOUNDS_PERCENT) + 1))

    def add(self, latency_ns: int, shadow_latency_ns: int) -> None:
        """Count one step."""
        difference = shadow_latency_ns - latency_ns
        size = abs(difference)
        self.min_difference_ns = min(self.min_difference_ns, difference) if self.steps else difference
        self.max_difference_ns = max(self.max_difference_ns, difference) if self.steps else difference
        self.steps += 1
        self.latency_ns += latency_ns
        self.shadow_latency_ns += shadow_latency_ns
        self.absolute_difference_ns += size
        self.longer_steps += difference > 0
        self.shorter_steps += difference < 0
        # The smallest whole percentage that is not below the difference: integers, so that a bound is met exactly.
        self.relative_buckets[bisect_left(BOUNDS_PERCENT, -(-100 * size // latency_ns))] += 1

    def merge(self, other: Differences) -> None:
        """Count the steps of another one too."""
        if not other.steps:
            return
        least, most = other.min_difference_ns, other.max_difference_ns
        self.min_difference_ns = min(self.min_difference_ns, least) if self.steps else least
        self.max_difference_ns = max(self.max_difference_ns, most) if self.steps else most
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for i, count in enumerate(other.relative_buckets):
            self.relative_buckets[i] += count


_SUMS = (
    *("steps", "latency_ns", "shadow_latency_ns", "absolute_difference_ns"),
    *("longer_steps", "shorter_steps"),
)


class ComparedEngine(msgspec.Struct):
    """One engine under one generation."""

    pack_digest: str
    regions: dict[Region, Differences] = {}

    def add(self, region: Region, latency_ns: int, shadow_latency_ns: int) -> None:
        """Count one step."""
        differences = self.regions.get(region)
        if differences is None:
            differences = self.regions[region] = Differences()
        differences.add(latency_ns, shadow_latency_ns)

    def merge(self, other: ComparedEngine) -> None:
        """Count the steps of the same engine at another process."""
        for region, differences in other.regions.items():
            self.regions.setdefault(region, Differences()).merge(differences)


class Comparison(msgspec.Struct):
    """One generation with a shadow pack."""

    generation: int
    shadow_pack_digest: str
    engines: dict[str, ComparedEngine] = {}

    def engine(self, engine_id: str, pack_digest: str) -> ComparedEngine:
        """Where the steps of an engine are counted."""
        engine = self.engines.get(engine_id)
        if engine is None:
            if len(self.engines) >= MAX_ENGINES:
                engine_id, pack_digest = OTHERS, ""
            engine = self.engines.setdefault(engine_id, ComparedEngine(pack_digest))
        return engine

    def merge(self, other: Comparison) -> None:
        """Count the steps of the same generation at another process."""
        for engine_id, compared in other.engines.items():
            self.engine(engine_id, compared.pack_digest).merge(compared)

    def totals(self) -> dict[Region, Differences]:
        """Over all engines."""
        total = ComparedEngine("")
        for engine in self.engines.values():
            total.merge(engine)
        return total.regions


class ShadowBook:
    """The comparisons of one experiment's last generations with a shadow pack. Event loop only."""

    def __init__(self) -> None:
        self._comparisons: dict[int, Comparison] = {}

    def comparison(self, generation: int, shadow_pack_digest: str) -> Comparison:
        """Where the steps of a generation are counted."""
        comparison = self._comparisons.get(generation)
        if comparison is None:
            comparison = self._comparisons[generation] = Comparison(generation, shadow_pack_digest)
            while len(self._comparisons) > KEPT_GENERATIONS:
                del self._comparisons[min(self._comparisons)]
        return comparison

    def comparisons(self) -> list[Comparison]:
        """All that are kept."""
        return list(self._comparisons.values())


def summed(books: Iterable[Iterable[Comparison]], generation: int, name: str) -> Comparison:
    """One generation over all processes; 0: the newest. GenerationNotFound where none has compared a step of it."""
    by_generation: dict[int, list[Comparison]] = {}
    for book in books:
        for comparison in book:
            by_generation.setdefault(comparison.generation, []).append(comparison)
    wanted = generation or max(by_generation, default=0)
    if wanted not in by_generation:
        raise GenerationNotFound(
            f"{'no generation' if not generation else f'generation {generation}'} of {name} has compared no step with "
            f"a shadow pack since this server started{_others(by_generation)}; `step-oracle experiment shadow NAME "
            "--pack PACK` binds one"
        )
    total = Comparison(wanted, by_generation[wanted][0].shadow_pack_digest)
    for comparison in by_generation[wanted]:
        total.merge(comparison)
    return total


def _others(found: Mapping[int, object]) -> str:
    return f" (generations {', '.join(map(str, sorted(found)))} have)" if found else ""
