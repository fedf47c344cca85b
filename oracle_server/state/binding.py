"""What one generation of an experiment says: everything that decides an answer, as one immutable value.

The structs mirror step_oracle.v1.Binding field by field; the database keeps them as JSON.
"""

from __future__ import annotations

import math

import msgspec

from oracle_server.errors import InvalidArgument
from oracle_server.sampling import lengths
from oracle_server.state.names import check_digest, check_engine_id

SUPPORT_SERVE = "serve"
SUPPORT_REFUSE = "refuse"

MAX_RULES = 1000
MAX_OVERLAYS = 100
MAX_LABELS = 64
MAX_TEXT = 256
MAX_LENGTH_CLASSES = 64
MAX_QUANTILES = 200_000
MAX_SCALE = 1e6
# As shards are told of it. A request of the wire has 4 MiB at most, which becomes 5 here.
MAX_BYTES = 8 << 20
MAX_PRODUCT = 1e12
MAX_ENGINE_IDS = 1000
# A draw becomes an index below a number of at most 32 bits.
MAX_EVERY_STEPS = 1 << 32
MAX_STALL_NS = 3_600_000_000_000
MAX_DEGRADATION_PER_HOUR = 1000.0


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which engines get which pack; all given conditions must hold."""

    pack_digest: str
    labels: dict[str, str] = {}
    model: str = ""
    tensor_parallel_size: int = 0
    fraction: float = 0.0
    fraction_salt: str = ""


class Overlay(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What happens to some engines without a new pack: slow-downs, stalls, errors, degradation."""

    slow_down_factor: float = 1.0
    labels: dict[str, str] = {}
    fraction: float = 0.0
    fraction_salt: str = ""
    stall_every_steps: int = 0
    stall_ns: int = 0
    error_every_steps: int = 0
    degradation_per_hour: float = 0.0
    begin_step_index: int = 0
    end_step_index: int = 0
    begin_device_time_ns: int = 0
    end_device_time_ns: int = 0
    engine_ids: tuple[str, ...] = ()


class LengthClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Quantiles of the output length per bin of the prompt length, for one class of requests."""

    name: str
    prompt_bin_begin: tuple[int, ...]
    quantile_tokens: tuple[float, ...]
    quantiles_per_bin: int


class LengthTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Output lengths of the requests that say nothing themselves."""

    classes: tuple[LengthClass, ...]
    provenance: str = ""


class Binding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Packs, rules, seed and policies of one generation."""

    rules: tuple[Rule, ...] = ()
    default_pack_digest: str = ""
    seed: int = 0
    support_policy: str = SUPPORT_SERVE
    length_table: LengthTable | None = None
    draft_acceptance_rate: float = 0.0
    time_scale: float = 1.0
    overlays: tuple[Overlay, ...] = ()
    shadow_pack_digest: str = ""

    def digests(self) -> tuple[str, ...]:
        """Every pack it names, each once, in order of first mention."""
        shadow = (self.shadow_pack_digest,) if self.shadow_pack_digest else ()
        return tuple(dict.fromkeys((*self.answering_digests(), *shadow)))

    def answering_digests(self) -> tuple[str, ...]:
        """The packs answers are from; the shadow pack has no say in them."""
        named = [rule.pack_digest for rule in self.rules]
        if self.default_pack_digest:
            named.append(self.default_pack_digest)
        return tuple(dict.fromkeys(named))


def encode(binding: Binding) -> bytes:
    """JSON for the database."""
    return msgspec.json.encode(binding)


def decode(data: bytes) -> Binding:
    """The inverse of encode; raises msgspec.ValidationError on what encode never wrote."""
    return msgspec.json.decode(data, type=Binding)


def length_tables(table: LengthTable) -> lengths.LengthTables:
    """The table in the form that is drawn from; InvalidArgument where it is not well formed."""
    return lengths.LengthTables(
        lengths.LengthClass(c.name, c.prompt_bin_begin, c.quantile_tokens, c.quantiles_per_bin) for c in table.classes
    )


def check(binding: Binding) -> None:
    """Raise InvalidArgument, naming the field, unless the binding is well formed. Its packs need not exist."""
    if not binding.rules and not binding.default_pack_digest:
        raise InvalidArgument(
            "the binding names no pack; give a default pack or at least one rule", field="binding.default_pack_digest"
        )
    if binding.default_pack_digest:
        check_digest(binding.default_pack_digest, "binding.default_pack_digest")
    _at_most(len(binding.rules), MAX_RULES, "binding.rules")
    for i, rule in enumerate(binding.rules):
        where = f"binding.rules[{i}]"
        check_digest(rule.pack_digest, f"{where}.pack_digest")
        _check_share(rule.labels, rule.fraction, rule.fraction_salt, where)
        _at_most(len(rule.model), 4 * MAX_TEXT, f"{where}.model")
    if binding.shadow_pack_digest:
        check_digest(binding.shadow_pack_digest, "binding.shadow_pack_digest")
    _at_most(len(binding.overlays), MAX_OVERLAYS, "binding.overlays")
    for i, overlay in enumerate(binding.overlays):
        _check_overlay(overlay, f"binding.overlays[{i}]")
    product = math.prod([max(1.0, factor) for factor in (binding.time_scale, *_factors(binding))])
    if product > MAX_PRODUCT:
        raise InvalidArgument(
            f"time_scale and the slow-downs of the overlays together are {product:g}; allowed: at most {MAX_PRODUCT:g}",
            field="binding.overlays",
        )
    if not 0 <= binding.draft_acceptance_rate <= 1:
        raise InvalidArgument(
            f"binding.draft_acceptance_rate is {binding.draft_acceptance_rate}; allowed: 0 (unknown) to 1",
            field="binding.draft_acceptance_rate",
        )
    if not 0 < binding.time_scale <= MAX_SCALE:
        raise InvalidArgument(
            f"binding.time_scale is {binding.time_scale}; allowed: 0 (means 1) to {MAX_SCALE:g}",
            field="binding.time_scale",
        )
    if binding.length_table is not None:
        _check_lengths(binding.length_table)
    size = len(msgspec.msgpack.encode(binding))
    if size > MAX_BYTES:
        raise InvalidArgument(
            f"the binding has {size:,} bytes; allowed: at most {MAX_BYTES:,}. Give fewer or shorter labels, or fewer "
            "quantiles",
            field="binding",
        )


def _factors(binding: Binding) -> list[float]:
    return [overlay.slow_down_factor for overlay in binding.overlays]


def _check_overlay(overlay: Overlay, where: str) -> None:
    _check_share(overlay.labels, overlay.fraction, overlay.fraction_salt, where)
    _at_most(len(overlay.engine_ids), MAX_ENGINE_IDS, f"{where}.engine_ids")
    for engine_id in overlay.engine_ids:
        check_engine_id(engine_id, f"{where}.engine_ids")
    values: tuple[tuple[str, float, bool, str], ...] = (
        (
            "slow_down_factor",
            overlay.slow_down_factor,
            0 < overlay.slow_down_factor <= MAX_SCALE,
            f"above 0 (0 means 1), at most {MAX_SCALE:g}",
        ),
        (
            "stall_every_steps",
            overlay.stall_every_steps,
            overlay.stall_every_steps <= MAX_EVERY_STEPS,
            "0 (none) to 2^32",
        ),
        (
            "error_every_steps",
            overlay.error_every_steps,
            overlay.error_every_steps <= MAX_EVERY_STEPS,
            "0 (none) to 2^32",
        ),
        ("stall_ns", overlay.stall_ns, overlay.stall_ns <= MAX_STALL_NS, f"at most {MAX_STALL_NS} (an hour)"),
        (
            "stall_ns",
            overlay.stall_ns,
            (overlay.stall_ns > 0) == (overlay.stall_every_steps > 0),
            "above 0 with stall_every_steps, 0 without: a stall has a length and a share of steps",
        ),
        (
            "degradation_per_hour",
            overlay.degradation_per_hour,
            0 <= overlay.degradation_per_hour <= MAX_DEGRADATION_PER_HOUR,
            f"0 (none) to {MAX_DEGRADATION_PER_HOUR:g}",
        ),
        (
            "end_step_index",
            overlay.end_step_index,
            overlay.end_step_index == 0 or overlay.end_step_index > overlay.begin_step_index,
            f"0 (no end), or above begin_step_index, which is {overlay.begin_step_index}",
        ),
        (
            "end_device_time_ns",
            overlay.end_device_time_ns,
            overlay.end_device_time_ns == 0 or overlay.end_device_time_ns > overlay.begin_device_time_ns,
            f"0 (no end), or above begin_device_time_ns, which is {overlay.begin_device_time_ns}",
        ),
    )
    for name, value, is_allowed, allowed in values:
        if not is_allowed:
            raise InvalidArgument(f"{where}.{name} is {value}; allowed: {allowed}", field=f"{where}.{name}")
    if not (
        overlay.slow_down_factor != 1
        or overlay.stall_every_steps
        or overlay.error_every_steps
        or overlay.degradation_per_hour
    ):
        raise InvalidArgument(
            f"{where} has no effect; give it a slow_down_factor, stalls, errors or a degradation_per_hour", field=where
        )


def _check_share(labels: dict[str, str], fraction: float, salt: str, where: str) -> None:
    check_labels(labels, f"{where}.labels")
    if not 0 <= fraction <= 1:
        raise InvalidArgument(f"{where}.fraction is {fraction}; allowed: 0 (all) to 1", field=f"{where}.fraction")
    _at_most(len(salt), MAX_TEXT, f"{where}.fraction_salt")


def check_labels(labels: dict[str, str], field: str) -> None:
    """Raise InvalidArgument unless there are at most 64 labels of at most 256 characters."""
    _at_most(len(labels), MAX_LABELS, field)
    for key, value in labels.items():
        if not key or len(key) > MAX_TEXT or len(value) > MAX_TEXT:
            raise InvalidArgument(
                f"{field} has the label {key[:80]!r}; a key has 1 to {MAX_TEXT} characters, a value at most {MAX_TEXT}",
                field=field,
            )


def _check_lengths(table: LengthTable) -> None:
    where = "binding.length_table"
    _at_most(len(table.classes), MAX_LENGTH_CLASSES, f"{where}.classes")
    _at_most(sum(len(c.quantile_tokens) for c in table.classes), MAX_QUANTILES, f"{where}.classes.quantile_tokens")
    length_tables(table)


def _at_most(count: int, limit: int, field: str) -> None:
    if count > limit:
        raise InvalidArgument(f"{field} has {count}; allowed: at most {limit}", field=field)
