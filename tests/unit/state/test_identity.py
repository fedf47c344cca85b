"""Rules choose an engine's pack from who it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from oracle_server.errors import NoRuleMatches
from oracle_server.state.binding import Binding, Rule
from oracle_server.state.identity import EngineIdentity, pack_of, rule_fits

ENGINE = EngineIdentity("tenants/default/experiments/e", "server-1", {"gpu": "l40s"}, "/models/Qwen3-4B", 2)


@pytest.mark.parametrize(
    ("rule", "fits"),
    [
        (Rule("p"), True),
        (Rule("p", model="/models/Qwen3-4B"), True),
        (Rule("p", model="Qwen3-4B"), True),
        (Rule("p", model="Qwen3"), False),
        (Rule("p", tensor_parallel_size=2), True),
        (Rule("p", tensor_parallel_size=1), False),
        (Rule("p", labels={"gpu": "l40s"}), True),
        (Rule("p", labels={"gpu": "h100"}), False),
        (Rule("p", labels={"gpu": "l40s", "rack": "7"}), False),
        (Rule("p", fraction=1.0), True),
        (Rule("p", labels={"gpu": "l40s"}, model="Qwen3-4B", tensor_parallel_size=1), False),
    ],
)
def test_all_given_conditions_must_hold(rule: Rule, fits: bool) -> None:
    assert rule_fits(rule, ENGINE) is fits


def test_what_an_engine_does_not_know_yet_fits() -> None:
    asking = replace(ENGINE, model="", tensor_parallel_size=0)
    assert rule_fits(Rule("p", model="Qwen3-4B", tensor_parallel_size=8), asking)
    assert not rule_fits(Rule("p", model="Qwen3-4B", labels={"gpu": "h100"}), asking)


def test_the_first_rule_that_fits_wins_and_the_default_comes_last() -> None:
    rules = (Rule("a", tensor_parallel_size=4), Rule("b", tensor_parallel_size=2), Rule("c"))
    assert pack_of(Binding(rules=rules), ENGINE) == "b"
    assert pack_of(Binding(rules=rules[:1], default_pack_digest="d"), ENGINE) == "d"
    with pytest.raises(NoRuleMatches, match="server-1"):
        pack_of(Binding(rules=rules[:1]), ENGINE)


def test_a_fraction_takes_about_its_share_and_splits_by_server() -> None:
    """1,000 draws of 0.3: the count lies within 300 +- 70 with a false alarm below 1e-5."""
    rule = Rule("p", fraction=0.3, fraction_salt="s")
    taken = [rule_fits(rule, replace(ENGINE, engine_id=f"server-{i}")) for i in range(1000)]
    assert 230 <= sum(taken) <= 370
    for i in range(50):
        assert rule_fits(rule, replace(ENGINE, engine_id=f"server-{i}/dp3")) is taken[i]


def test_rules_of_one_salt_split_the_same_servers() -> None:
    half, less = Rule("p", fraction=0.5, fraction_salt="s"), Rule("p", fraction=0.2, fraction_salt="s")
    for i in range(200):
        engine = replace(ENGINE, engine_id=f"server-{i}")
        assert rule_fits(half, engine) or not rule_fits(less, engine)
