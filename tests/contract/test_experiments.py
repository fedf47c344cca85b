"""The control plane: generations, history, watches."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from oracle_calls import EXPERIMENT, TIMEOUT, Calls, decode, identity, reason_of
from step_oracle.v1 import experiment_pb2 as pb
from step_oracle.v1 import tenant_pb2
from stores import BOTH_STORES

Dirs = dict[str, Path]


def watch(calls: Calls, after: int = 0) -> Iterator[pb.WatchExperimentResponse]:
    request = pb.WatchExperimentRequest(name=EXPERIMENT, after_generation=after)
    return calls.experiments.WatchExperiment(request, timeout=60)  # type: ignore[no-any-return]


def history(calls: Calls, **fields: int) -> list[tuple[int, str]]:
    request = pb.ListGenerationsRequest(name=EXPERIMENT, **fields)  # type: ignore[arg-type]
    return [
        (r.generation, r.reason) for r in calls.client.pages(calls.experiments.ListGenerations, request, "generations")
    ]


def test_a_binding_is_read_back_as_it_was_given(calls: Calls, pack_dirs: Dirs) -> None:
    digest = calls.upload(pack_dirs["constant"])
    table = pb.LengthClass(name="", prompt_bin_begin=[0, 7], quantile_tokens=[1, 2.5, 3, 4], quantiles_per_bin=2)
    binding = pb.Binding(
        rules=[
            pb.Rule(labels={"a": "b"}, model="m", tensor_parallel_size=4, pack_digest=digest),
            pb.Rule(fraction=0.3, fraction_salt="s", pack_digest=digest),
        ],
        default_pack_digest=digest,
        seed=2**64 - 1,
        support_policy=pb.SUPPORT_POLICY_REFUSE,
        length_table=pb.LengthTable(classes=[table], provenance="made up"),
        draft_acceptance_rate=0.7,
        time_scale=0.1,
        overlays=[
            pb.Overlay(labels={"c": "d"}, fraction=0.5, fraction_salt="t", slow_down_factor=1.25),
            pb.Overlay(
                slow_down_factor=1,
                stall_every_steps=2**32,
                stall_ns=7,
                error_every_steps=9,
                degradation_per_hour=0.25,
                begin_step_index=2**63,
                end_step_index=2**64 - 1,
                begin_device_time_ns=3,
                end_device_time_ns=4,
                engine_ids=["x", "y/dp1"],
            ),
        ],
        shadow_pack_digest=digest,
    )
    request = pb.CreateExperimentRequest(parent="tenants/default", experiment_id="default", binding=binding)
    created = calls.experiments.CreateExperiment(request, timeout=TIMEOUT).experiment
    assert created.binding == binding
    got = calls.experiments.GetExperiment(pb.GetExperimentRequest(name=EXPERIMENT), timeout=TIMEOUT).experiment
    assert got == created
    assert (got.name, got.generation, got.attached_engines) == (EXPERIMENT, 1, 0)


BAD = {
    "no pack": (pb.Binding(default_pack_digest=""), False),
    "half a digest": (pb.Binding(default_pack_digest="sha256:12"), False),
    "a rule without a pack": (pb.Binding(rules=[pb.Rule()]), True),
    "a fraction above 1": (pb.Binding(rules=[pb.Rule(fraction=1.5)]), True),
    "a fraction that is no number": (pb.Binding(rules=[pb.Rule(fraction=float("nan"))]), True),
    "a negative scale": (pb.Binding(time_scale=-1), True),
    "an endless scale": (pb.Binding(time_scale=float("inf")), True),
    "a rate above 1": (pb.Binding(draft_acceptance_rate=1.01), True),
    "a table without classes": (pb.Binding(length_table=pb.LengthTable()), True),
    "a descending table": (
        pb.Binding(
            length_table=pb.LengthTable(
                classes=[pb.LengthClass(prompt_bin_begin=[0], quantile_tokens=[9, 5], quantiles_per_bin=2)]
            )
        ),
        True,
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_binding_that_cannot_be_is_refused(fault: str, shared: Calls) -> None:
    binding, complete = BAD[fault]
    digest = shared.experiments.GetExperiment(pb.GetExperimentRequest(name=EXPERIMENT)).experiment.binding
    message = pb.Binding()
    message.CopyFrom(binding)
    if complete:
        message.default_pack_digest = digest.default_pack_digest
        for rule in message.rules:
            if fault != "a rule without a pack":
                rule.pack_digest = digest.default_pack_digest
    request = pb.ActivateExperimentRequest(name=EXPERIMENT, binding=message)
    with pytest.raises(grpc.RpcError) as caught:
        shared.experiments.ActivateExperiment(request, timeout=TIMEOUT)
    assert reason_of(caught.value) == ("INVALID_ARGUMENT", "INVALID_ARGUMENT")


@BOTH_STORES
def test_a_roll_back_is_a_new_generation(calls: Calls, pack_dirs: Dirs) -> None:
    ten, twenty = calls.upload(pack_dirs["constant"]), calls.upload(pack_dirs["constant20"])
    calls.create(ten)
    calls.activate(twenty)
    calls.activate(twenty, seed=9)
    response = calls.experiments.RollBackExperiment(
        pb.RollBackExperimentRequest(name=EXPERIMENT, to_generation=1, expected_generation=3), timeout=TIMEOUT
    )
    assert (response.experiment.generation, response.experiment.binding.default_pack_digest) == (4, ten)
    assert calls.sample(identity("e"), [decode(0)])[0].latency_ns[0] == 10_000_000
    before = calls.experiments.RollBackExperiment(pb.RollBackExperimentRequest(name=EXPERIMENT), timeout=TIMEOUT)
    assert before.experiment.binding.seed == 9
    reasons = ["roll back to 3", "roll back to 1", "activate", "activate", "create"]
    assert history(calls) == list(zip(range(5, 0, -1), reasons, strict=True))
    assert history(calls, page_size=2) == history(calls)


@BOTH_STORES
def test_of_two_activations_from_one_generation_one_wins(calls: Calls, pack_dirs: Dirs) -> None:
    digest = calls.upload(pack_dirs["constant"])
    calls.create(digest)
    outcomes: list[str] = []

    def activate(seed: int) -> None:
        try:
            calls.activate(digest, seed=seed, request={"expected_generation": 1})
            outcomes.append("OK")
        except grpc.RpcError as error:
            outcomes.append(reason_of(error)[1])

    threads = [threading.Thread(target=activate, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["GENERATION_CONFLICT"] * 7 + ["OK"]
    assert len(history(calls)) == 2


def test_a_dry_run_changes_nothing(calls: Calls, pack_dirs: Dirs) -> None:
    digest = calls.upload(pack_dirs["constant"])
    calls.create(digest)
    assert calls.activate(digest, seed=4, request={"validate_only": True}).experiment.generation == 1
    assert len(history(calls)) == 1


@BOTH_STORES
def test_a_watch_sees_the_present_then_every_change(calls: Calls, pack_dirs: Dirs) -> None:
    digest = calls.upload(pack_dirs["constant"])
    calls.create(digest, seed=1)
    calls.activate(digest, seed=2)
    present, resumed = watch(calls), watch(calls, after=2)
    assert next(present).experiment.generation == 2
    for seed in (3, 4, 5):
        calls.activate(digest, seed=seed)
    for call in (present, resumed):
        seen = [next(call).experiment for _ in range(3)]
        assert [(e.generation, e.binding.seed) for e in seen] == [(3, 3), (4, 4), (5, 5)]
    calls.experiments.DeleteExperiment(pb.DeleteExperimentRequest(name=EXPERIMENT), timeout=TIMEOUT)
    with pytest.raises(grpc.RpcError) as caught:
        next(present)
    assert reason_of(caught.value) == ("NOT_FOUND", "EXPERIMENT_NOT_FOUND")


def test_a_watch_that_lags_gets_the_present_first(calls: Calls, pack_dirs: Dirs) -> None:
    digest = calls.upload(pack_dirs["constant"])
    calls.create(digest)
    for seed in (2, 3):
        calls.activate(digest, seed=seed)
    assert next(watch(calls, after=1)).experiment.generation == 3


def test_experiments_are_listed_in_pages(calls: Calls, pack_dirs: Dirs) -> None:
    digest = calls.upload(pack_dirs["constant"])
    for name in ("c", "a", "b"):
        calls.create(digest, experiment_id=name)
    request = pb.ListExperimentsRequest(parent="tenants/default", page_size=2)
    found = [
        e.name.rpartition("/")[2] for e in calls.client.pages(calls.experiments.ListExperiments, request, "experiments")
    ]
    assert found == ["a", "b", "c"]


def test_the_first_boot_makes_the_default_tenant_only(shared: Calls) -> None:
    response = shared.tenants.ListTenants(tenant_pb2.ListTenantsRequest(), timeout=TIMEOUT)
    assert [tenant.name for tenant in response.tenants] == ["tenants/default"]
