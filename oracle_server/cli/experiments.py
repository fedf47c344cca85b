"""`step-oracle experiment`: which packs answer for a fleet."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oracle_server.cli.console import (
    TARGET,
    TENANT,
    USAGE,
    Json,
    Target,
    Tenant,
    as_dict,
    connect,
    experiment_name,
    fail,
    print_json,
    print_table,
)
from oracle_server.cli.packs import resolve

if TYPE_CHECKING:
    from oracle_server.rpc.client import Client
    from step_oracle.v1 import experiment_pb2 as pb

app = typer.Typer(
    name="experiment", help="Experiments: which packs answer for a fleet.", no_args_is_help=True, rich_markup_mode=None
)

_Name = Annotated[str, typer.Argument(help="Name or id of the experiment.")]
_Pack = Annotated[
    str | None, typer.Option(help="Pack of the engines no rule fits: digest, its beginning, or a local folder.")
]
_Rule = Annotated[
    list[str] | None,
    typer.Option(
        help="CONDITIONS=>PACK, first that fits wins; conditions: label.KEY=VALUE, model=M, tp=N, fraction=F, salt=S, "
        "separated by commas. May be repeated."
    ),
]
_Binding = Annotated[Path | None, typer.Option(help="JSON file of a whole Binding; other options replace its fields.")]
_Seed = Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="Seed of every draw.")]
_Policy = Annotated[str | None, typer.Option(help="Steps outside the pack: serve or refuse.")]
_Lengths = Annotated[Path | None, typer.Option(help="Table of output lengths, from `lengths fit`.")]
_Rate = Annotated[float | None, typer.Option(help="Probability that a draft token is accepted.")]
_Scale = Annotated[float | None, typer.Option(help="Factor on every latency.")]
_Comment = Annotated[str, typer.Option(help="Why, for the history.")]
_Expected = Annotated[int, typer.Option(help="Refuse unless the experiment is at this generation.")]
_Allow = Annotated[list[str] | None, typer.Option(help="Cold field that may differ; may be repeated.")]


@app.command()
def create(
    name: _Name,
    pack: _Pack = None,
    rule: _Rule = None,
    binding: _Binding = None,
    seed: _Seed = None,
    support_policy: _Policy = None,
    lengths: _Lengths = None,
    draft_acceptance_rate: _Rate = None,
    time_scale: _Scale = None,
    comment: _Comment = "",
    tenant: Tenant = TENANT,
    target: Target = TARGET,
    json_output: Json = False,
) -> None:
    """Bind a new experiment to packs."""
    with connect(target) as client:
        from step_oracle.v1 import experiment_pb2 as pb

        full = experiment_name(name, tenant)
        message = _binding(
            client, _tenant_of(full), pb.Binding(), pack, rule, binding, seed, support_policy, lengths,
            draft_acceptance_rate, time_scale,
        )  # fmt: skip
        request = pb.CreateExperimentRequest(
            parent=full.rpartition("/experiments/")[0],
            experiment_id=full.rpartition("/")[2],
            binding=message,
            comment=comment,
        )
        experiment = client.call(client.experiments.CreateExperiment, request).experiment
    _print_experiment(experiment, json_output)


@app.command()
def activate(
    name: _Name,
    pack: _Pack = None,
    rule: _Rule = None,
    binding: _Binding = None,
    seed: _Seed = None,
    support_policy: _Policy = None,
    lengths: _Lengths = None,
    draft_acceptance_rate: _Rate = None,
    time_scale: _Scale = None,
    expected_generation: _Expected = 0,
    allow_mismatch: _Allow = None,
    dry_run: Annotated[bool, typer.Option(help="Check only, change nothing.")] = False,
    comment: _Comment = "",
    tenant: Tenant = TENANT,
    target: Target = TARGET,
    json_output: Json = False,
) -> None:
    """Make another binding answer; what is not given stays as it is."""
    with connect(target) as client:
        from step_oracle.v1 import experiment_pb2 as pb

        full = experiment_name(name, tenant)
        current = client.call(client.experiments.GetExperiment, pb.GetExperimentRequest(name=full)).experiment
        message = _binding(
            client, _tenant_of(full), current.binding, pack, rule, binding, seed, support_policy, lengths,
            draft_acceptance_rate, time_scale,
        )  # fmt: skip
        request = pb.ActivateExperimentRequest(
            name=full,
            binding=message,
            # The rest of the binding is of the generation just read: another one in between must not be undone.
            expected_generation=expected_generation or current.generation,
            allow_mismatch=allow_mismatch or (),
            validate_only=dry_run,
            comment=comment,
        )
        response = client.call(client.experiments.ActivateExperiment, request)
    for warning in response.warnings:
        typer.echo(f"warning: {warning}", err=True)
    _print_experiment(response.experiment, json_output)


@app.command()
def rollback(
    name: _Name,
    to_generation: Annotated[int, typer.Option(help="The generation to go back to [default: the one before].")] = 0,
    expected_generation: _Expected = 0,
    allow_mismatch: _Allow = None,
    comment: _Comment = "",
    tenant: Tenant = TENANT,
    target: Target = TARGET,
    json_output: Json = False,
) -> None:
    """Activate the binding of an earlier generation again, as a new generation."""
    with connect(target) as client:
        from step_oracle.v1 import experiment_pb2 as pb

        request = pb.RollBackExperimentRequest(
            name=experiment_name(name, tenant),
            to_generation=to_generation,
            expected_generation=expected_generation,
            allow_mismatch=allow_mismatch or (),
            comment=comment,
        )
        experiment = client.call(client.experiments.RollBackExperiment, request).experiment
    _print_experiment(experiment, json_output)


@app.command("list")
def list_experiments(tenant: Tenant = TENANT, target: Target = TARGET, json_output: Json = False) -> None:
    """Experiments of a tenant."""
    with connect(target) as client:
        from step_oracle.v1 import experiment_pb2 as pb

        request = pb.ListExperimentsRequest(parent=f"tenants/{tenant}")
        found = list(client.pages(client.experiments.ListExperiments, request, "experiments"))
    if json_output:
        print_json([as_dict(experiment) for experiment in found])
        return
    print_table(
        ("EXPERIMENT", "GENERATION", "ENGINES", "PACKS", "CHANGED"),
        [(e.name, e.generation, e.attached_engines, _packs(e.binding), _time(e.update_time)) for e in found],
    )


@app.command()
def get(name: _Name, tenant: Tenant = TENANT, target: Target = TARGET, json_output: Json = False) -> None:
    """One experiment."""
    with connect(target) as client:
        from step_oracle.v1 import experiment_pb2 as pb

        request = pb.GetExperimentRequest(name=experiment_name(name, tenant))
        experiment = client.call(client.experiments.GetExperiment, request).experiment
    _print_experiment(experiment, json_output)


@app.command()
def watch(
    name: _Name,
    after_generation: Annotated[int, typer.Option(help="Skip the present state if it is still this one.")] = 0,
    tenant: Tenant = TENANT,
    target: Target = TARGET,
    json_output: Json = False,
) -> None:
    """Print the present state, then one line per change, until interrupted."""
    with connect(target) as client:
        from step_oracle.v1 import experiment_pb2 as pb

        request = pb.WatchExperimentRequest(name=experiment_name(name, tenant), after_generation=after_generation)
        for response in client.stream(client.experiments.WatchExperiment, request):
            _print_experiment(response.experiment, json_output)


@app.command()
def history(name: _Name, tenant: Tenant = TENANT, target: Target = TARGET, json_output: Json = False) -> None:
    """The generations of an experiment, newest first."""
    with connect(target) as client:
        from step_oracle.v1 import experiment_pb2 as pb

        request = pb.ListGenerationsRequest(name=experiment_name(name, tenant))
        found = list(client.pages(client.experiments.ListGenerations, request, "generations"))
    if json_output:
        print_json([as_dict(record) for record in found])
        return
    print_table(
        ("GENERATION", "REASON", "PACKS", "SEED", "CREATED", "BY", "COMMENT"),
        [
            (r.generation, r.reason, _packs(r.binding), r.binding.seed, _time(r.create_time), r.principal, r.comment)
            for r in found
        ],
    )


@app.command()
def engines(name: _Name, tenant: Tenant = TENANT, target: Target = TARGET, json_output: Json = False) -> None:
    """The engines attached now."""
    with connect(target) as client:
        from step_oracle.v1 import experiment_pb2 as pb

        request = pb.ListEnginesRequest(parent=experiment_name(name, tenant))
        found = client.call(client.experiments.ListEngines, request).engines
    if json_output:
        print_json([as_dict(engine) for engine in found])
        return
    header = ("ENGINE", "STREAM", "STEPS", "LEASED", "EXTRAPOLATED", "LATE", "RECONNECTS", "DEGRADED", "PACK", "VLLM")
    print_table(
        header,
        [
            (
                e.engine_id,
                "open" if e.streaming else "none yet",
                e.steps,
                e.leased_steps,
                e.extrapolated_steps,
                e.late_answers,
                e.reconnects,
                "yes" if e.degraded else "no",
                e.pack_digest[:19],
                e.vllm_version,
            )
            for e in found
        ],
    )


@app.command()
def delete(name: _Name, tenant: Tenant = TENANT, target: Target = TARGET) -> None:
    """Forget an experiment no engine is attached to."""
    with connect(target) as client:
        from step_oracle.v1 import experiment_pb2 as pb

        full = experiment_name(name, tenant)
        client.call(client.experiments.DeleteExperiment, pb.DeleteExperimentRequest(name=full))
    typer.echo(f"{full} deleted")


def _binding(
    client: Client,
    tenant: str,
    start: pb.Binding,
    pack: str | None,
    rules: list[str] | None,
    file: Path | None,
    seed: int | None,
    support_policy: str | None,
    lengths: Path | None,
    draft_acceptance_rate: float | None,
    time_scale: float | None,
) -> pb.Binding:
    """`start`, or the file's binding, with the options given in their place."""
    from step_oracle.v1 import experiment_pb2 as pb

    binding = pb.Binding()
    binding.CopyFrom(start if file is None else _read(file, pb.Binding()))
    if pack is not None:
        binding.default_pack_digest = pack
    if rules is not None:
        del binding.rules[:]
        binding.rules.extend([_rule(text) for text in rules])
    if binding.default_pack_digest:
        binding.default_pack_digest = resolve(client, tenant, binding.default_pack_digest)
    for rule in binding.rules:
        rule.pack_digest = resolve(client, tenant, rule.pack_digest)
    if seed is not None:
        binding.seed = seed
    if support_policy is not None:
        policies = {"serve": pb.SUPPORT_POLICY_SERVE, "refuse": pb.SUPPORT_POLICY_REFUSE}
        if support_policy not in policies:
            fail(f"--support-policy is {support_policy!r}; allowed: serve, refuse", USAGE)
        binding.support_policy = policies[support_policy]
    if lengths is not None:
        binding.length_table.CopyFrom(_read(lengths, pb.LengthTable()))
    if draft_acceptance_rate is not None:
        binding.draft_acceptance_rate = draft_acceptance_rate
    if time_scale is not None:
        binding.time_scale = time_scale
    return binding


def _rule(text: str) -> pb.Rule:
    from step_oracle.v1 import experiment_pb2 as pb

    conditions, arrow, pack = text.rpartition("=>")
    if not arrow or not pack:
        fail(f"--rule is {text!r}; it has the form CONDITIONS=>PACK, for example label.gpu=l40s,tp=2=>4f1c09", USAGE)
    rule = pb.Rule(pack_digest=pack.strip())
    for condition in filter(None, conditions.split(",")):
        key, _, value = condition.strip().partition("=")
        try:
            if key.startswith("label.") and len(key) > len("label."):
                rule.labels[key.removeprefix("label.")] = value
            elif key == "model":
                rule.model = value
            elif key == "tp":
                rule.tensor_parallel_size = int(value)
            elif key == "fraction":
                rule.fraction = float(value)
            elif key == "salt":
                rule.fraction_salt = value
            else:
                raise ValueError
        except ValueError:
            fail(
                f"--rule has the condition {condition!r}; allowed: label.KEY=VALUE, model=M, tp=N, fraction=F, salt=S",
                USAGE,
            )
    return rule


def _read(path: Path, message: Any) -> Any:
    from google.protobuf import json_format

    try:
        return json_format.Parse(path.read_text(), message)
    except (OSError, UnicodeDecodeError, json_format.ParseError) as error:
        fail(f"{path}: {error}", USAGE)


def _print_experiment(experiment: pb.Experiment, json_output: bool) -> None:
    if json_output:
        print_json(as_dict(experiment))
        return
    typer.echo(
        f"{experiment.name}: generation {experiment.generation}, {experiment.attached_engines} engines, "
        f"packs {_packs(experiment.binding)}, seed {experiment.binding.seed}, changed {_time(experiment.update_time)}"
    )


def _packs(binding: pb.Binding) -> str:
    digests = [rule.pack_digest for rule in binding.rules] + [binding.default_pack_digest]
    return ",".join(dict.fromkeys(digest[:19] for digest in digests if digest))


def _time(stamp: Any) -> str:
    return datetime.fromtimestamp(stamp.seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _tenant_of(name: str) -> str:
    return name.split("/")[1]
