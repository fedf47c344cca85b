"""Who an engine is, and which share of a fleet it belongs to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from oracle_server.errors import NoRuleMatches
from oracle_server.sampling import draws
from oracle_server.state.binding import Binding, Rule


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """The fields a rule can look at. `experiment` is the full resource name."""

    experiment: str
    engine_id: str
    labels: Mapping[str, str]
    model: str
    tensor_parallel_size: int


def pack_of(binding: Binding, identity: EngineIdentity) -> str:
    """Digest of the first rule that fits, else of the default pack; NoRuleMatches where there is neither."""
    for rule in binding.rules:
        if rule_fits(rule, identity):
            return rule.pack_digest
    if binding.default_pack_digest:
        return binding.default_pack_digest
    labels = ", ".join(f"{key}={value}" for key, value in sorted(identity.labels.items())) or "no labels"
    raise NoRuleMatches(
        f"none of the {len(binding.rules)} rules of {identity.experiment} fits the engine {identity.engine_id!r} "
        f"(model {identity.model!r}, tensor parallel {identity.tensor_parallel_size}, {labels}) and there is no "
        "default pack; add a rule or a default pack, or give the engine the labels a rule asks for"
    )


def rule_fits(rule: Rule, identity: EngineIdentity) -> bool:
    """True where every condition the rule gives holds.

    An engine asks for its device before it knows its model and tensor-parallel size: what it does not know fits, else a
    rule by model could never give the device.
    """
    names = ("", rule.model)
    if rule.model and identity.model not in names and identity.model.rstrip("/").rpartition("/")[2] not in names:
        return False
    if rule.tensor_parallel_size and identity.tensor_parallel_size not in (0, rule.tensor_parallel_size):
        return False
    return in_share(rule.labels, rule.fraction, rule.fraction_salt, identity)


def is_named(engine_ids: Collection[str], identity: EngineIdentity) -> bool:
    """True where the engine, or the vLLM server it is a rank of, is among the ids."""
    return identity.engine_id in engine_ids or draws.server_of(identity.engine_id) in engine_ids


def in_share(labels: Mapping[str, str], fraction: float, salt: str, identity: EngineIdentity) -> bool:
    """True where the engine has the labels and its server stands below the fraction; 0 takes all."""
    if any(identity.labels.get(key) != value for key, value in labels.items()):
        return False
    return fraction == 0 or draws.fraction_draw(salt, identity.engine_id) < fraction
