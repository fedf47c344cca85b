"""`step-oracle experiment overlay`: slow-downs, stalls, errors and degradation of a running experiment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oracle_server.cli.bindings import edit_binding, read_binding
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

if TYPE_CHECKING:
    from step_oracle.v1 import experiment_pb2 as pb

_NS_PER_MS = 1_000_000
_NS_PER_SECOND = 1_000_000_000


def overlay(
    name: Annotated[str, typer.Argument(help="Name or id of the experiment.")],
    engine: Annotated[
        list[str] | None,
        typer.Option(help="Engine it touches, or vLLM server (an id without /dpN); may be repeated [default: all]."),
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Label it asks for; may be repeated.")
    ] = None,
    fraction: Annotated[
        float, typer.Option(show_default=False, help="Share of the vLLM servers it touches, in (0, 1].")
    ] = 0.0,
    salt: Annotated[
        str, typer.Option(show_default=False, help="Salt of the fraction: another one draws other servers.")
    ] = "",
    slow_down: Annotated[
        float, typer.Option(metavar="FACTOR", show_default=False, help="Latencies are multiplied by it.")
    ] = 0.0,
    stall_every: Annotated[
        int, typer.Option(metavar="STEPS", show_default=False, help="One step in so many stalls for --stall-ms.")
    ] = 0,
    stall_ms: Annotated[float, typer.Option(show_default=False, help="How long a stall takes.")] = 0.0,
    error_every: Annotated[
        int,
        typer.Option(metavar="STEPS", show_default=False, help="One step in so many fails, and its engine with it."),
    ] = 0,
    degrade_per_hour: Annotated[
        float,
        typer.Option(metavar="SHARE", show_default=False, help="Latencies grow by this share per hour of device time."),
    ] = 0.0,
    from_step: Annotated[int, typer.Option(show_default=False, help="First step index it acts on.")] = 0,
    to_step: Annotated[
        int, typer.Option(show_default=False, help="First step index it acts on no more [default: no end].")
    ] = 0,
    from_device_seconds: Annotated[float, typer.Option(show_default=False, help="Device time it begins at.")] = 0.0,
    to_device_seconds: Annotated[
        float, typer.Option(show_default=False, help="Device time it ends at [default: no end].")
    ] = 0.0,
    file: Annotated[
        Path | None, typer.Option(help="JSON list of Overlay messages to add, as --json prints them.")
    ] = None,
    remove: Annotated[
        list[int] | None, typer.Option(metavar="NUMBER", help="Overlay to remove first; may be repeated.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove all overlays first.")] = False,
    time_scale: Annotated[float | None, typer.Option(help="Also set the factor on every time.")] = None,
    expected_generation: Annotated[
        int, typer.Option(show_default=False, help="Refuse unless the experiment is at this generation.")
    ] = 0,
    dry_run: Annotated[bool, typer.Option(help="Check only, change nothing.")] = False,
    tenant: Tenant = TENANT,
    target: Target = TARGET,
    json_output: Json = False,
) -> None:
    """Show the overlays of an experiment, or add and remove some; the rest of its binding stays.

    Each is a function of the engine's step index and device time, so answers can be recomputed. Roll back to undo.
    """
    from step_oracle.v1 import experiment_pb2 as pb

    added = [] if file is None else _read_file(file)
    option = pb.Overlay(
        labels=_labels(label or []),
        fraction=fraction,
        fraction_salt=salt,
        slow_down_factor=slow_down,
        stall_every_steps=_count(stall_every, "--stall-every"),
        stall_ns=_ns(stall_ms, _NS_PER_MS, "--stall-ms"),
        error_every_steps=_count(error_every, "--error-every"),
        degradation_per_hour=degrade_per_hour,
        begin_step_index=_count(from_step, "--from-step"),
        end_step_index=_count(to_step, "--to-step"),
        begin_device_time_ns=_ns(from_device_seconds, _NS_PER_SECOND, "--from-device-seconds"),
        end_device_time_ns=_ns(to_device_seconds, _NS_PER_SECOND, "--to-device-seconds"),
        engine_ids=engine or (),
    )
    if option != pb.Overlay():
        added.append(option)
    full = experiment_name(name, tenant)
    with connect(target) as client:
        if added or remove or clear or time_scale is not None:

            def edit(binding: pb.Binding) -> None:
                _edit(binding, added, remove or [], clear, time_scale)

            experiment = edit_binding(client, full, edit, expected_generation=expected_generation, dry_run=dry_run)
        else:
            experiment = read_binding(client, full)
    _print(experiment, json_output)


def _edit(
    binding: pb.Binding, added: list[pb.Overlay], removed: list[int], clear: bool, time_scale: float | None
) -> None:
    """The overlays by their numbers of before."""
    for number in removed:
        if not 0 <= number < len(binding.overlays):
            fail(f"--remove is {number}; the experiment has {len(binding.overlays)} overlays, numbered from 0", USAGE)
    kept = [overlay for i, overlay in enumerate(binding.overlays) if not clear and i not in removed]
    binding.ClearField("overlays")
    binding.overlays.extend([*kept, *added])
    if time_scale is not None:
        binding.time_scale = time_scale


def _print(experiment: pb.Experiment, json_output: bool) -> None:
    overlays = experiment.binding.overlays
    if json_output:
        print_json(
            {
                "generation": str(experiment.generation),
                "time_scale": experiment.binding.time_scale,
                "overlays": [as_dict(overlay) for overlay in overlays],
            }
        )
        return
    scale = experiment.binding.time_scale
    typer.echo(f"{experiment.name}: generation {experiment.generation}, time scale {scale:g}, {len(overlays)} overlays")
    if overlays:
        print_table(
            ("NUMBER", "ENGINES", "EFFECT", "WHILE"),
            [(i, _who(o), _what(o), _when(o)) for i, o in enumerate(overlays)],
        )


def _who(overlay: pb.Overlay) -> str:
    ids = list(overlay.engine_ids)
    words = [", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")] if ids else []
    words += [f"{key}={value}" for key, value in sorted(overlay.labels.items())]
    if overlay.fraction:
        words.append(
            f"{overlay.fraction:g} of all" + (f" (salt {overlay.fraction_salt})" if overlay.fraction_salt else "")
        )
    return "; ".join(words) or "all"


def _what(overlay: pb.Overlay) -> str:
    words = []
    if overlay.slow_down_factor not in (0, 1):
        words.append(f"x {overlay.slow_down_factor:g}")
    if overlay.stall_every_steps:
        words.append(f"1 step in {overlay.stall_every_steps} stalls {overlay.stall_ns / _NS_PER_MS:g} ms")
    if overlay.error_every_steps:
        words.append(f"1 step in {overlay.error_every_steps} fails")
    if overlay.degradation_per_hour:
        words.append(f"+{100 * overlay.degradation_per_hour:g} % per device hour")
    return ", ".join(words)


def _when(overlay: pb.Overlay) -> str:
    begin, end = overlay.begin_device_time_ns / _NS_PER_SECOND, overlay.end_device_time_ns / _NS_PER_SECOND
    words = []
    if overlay.begin_step_index or overlay.end_step_index:
        words.append(f"steps {overlay.begin_step_index} to {overlay.end_step_index or 'the end'}")
    if begin or end:
        words.append(f"device time {begin:g} s to {f'{end:g} s' if end else 'the end'}")
    return ", ".join(words) or "always"


def _labels(words: list[str]) -> dict[str, str]:
    labels = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals:
            fail(f"--label is {word!r}; it has the form KEY=VALUE, for example rack=7", USAGE)
        labels[key] = value
    return labels


def _count(value: int, option: str) -> int:
    if not 0 <= value < 1 << 63:
        fail(f"{option} is {value}; allowed: 0 or more", USAGE)
    return value


def _ns(value: float, unit_ns: int, option: str) -> int:
    if not 0 <= value * unit_ns < 1 << 63:
        fail(f"{option} is {value:g}; allowed: 0 or more", USAGE)
    return round(value * unit_ns)


def _read_file(path: Path) -> list[pb.Overlay]:
    from google.protobuf import json_format

    from step_oracle.v1 import experiment_pb2 as pb

    try:
        found: Any = json.loads(path.read_text())
        if isinstance(found, dict):
            found = found.get("overlays")
        if not isinstance(found, list):
            raise ValueError("it holds no list of overlays, nor an object with one under `overlays`")
        return [json_format.ParseDict(item, pb.Overlay()) for item in found]
    except (OSError, ValueError, json_format.ParseError) as error:
        fail(f"{path}: {error}", USAGE)
        return []
