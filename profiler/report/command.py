"""The command `step-oracle report`: files to sections, sections to one page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from oracle_server.errors import InvalidArgument
from oracle_server.pack import CompiledPack, PackReport
from profiler.pack_summary import headline, kv_line, uncertainty_line
from profiler.report import figures
from profiler.report.judged import DRAWS, JudgedSteps, RegionError, judge, region_errors
from profiler.report.measurements import Comparison, compare, read_measurement
from profiler.report.page import Section, Table, png_of, render
from profiler.report.plan_progress import PlanProgress, read_plans


@dataclass(frozen=True)
class ReportRequest:
    """What to put on the page; `real` and `emulated` come together, `on` needs a pack."""

    output: Path
    pack: Path | None = None
    on: Path | None = None
    real: Path | None = None
    emulated: Path | None = None
    png_folder: Path | None = None


def write_report(request: ReportRequest) -> list[Path]:
    """Writes the page, and the pictures where asked for; the files written."""
    if request.pack is None and request.real is None:
        raise InvalidArgument("give a PACK, or --real and --emulated", field="pack")
    if request.on is not None and request.pack is None:
        raise InvalidArgument("--on judges a pack: give a PACK", field="on")
    if (request.real is None) != (request.emulated is None):
        raise InvalidArgument("--real and --emulated are compared with each other: give both or neither", field="real")
    title, facts, sections = "Real and emulated", [], []
    if request.pack is not None:
        from profiler.surface import read_pack

        report, compiled = read_pack(request.pack)
        title, facts = report.manifest.name, _facts(report)
        sections.append(_surfaces(report, compiled))
        if request.on is not None:
            sections += _judged(judge(compiled, request.on))
            if request.on.is_dir() and (plans := read_plans(request.on)):
                sections.append(_plan(plans))
    if request.real is not None and request.emulated is not None:
        sections.append(_measured(request.real, request.emulated))
    return _write(request, render(title, facts, sections), sections)


def _write(request: ReportRequest, page: str, sections: list[Section]) -> list[Path]:
    written = [request.output]
    try:
        request.output.write_text(page, encoding="utf-8")
        if request.png_folder is not None:
            request.png_folder.mkdir(parents=True, exist_ok=True)
            for section in sections:
                if section.png is not None:
                    written.append(request.png_folder / f"{section.name}.png")
                    written[-1].write_bytes(section.png)
    except OSError as error:
        raise InvalidArgument(f"the report cannot be written: {error}", field="output") from error
    return written


def _facts(report: PackReport) -> list[tuple[str, str]]:
    manifest = report.manifest
    return [
        ("pack", headline(manifest)),
        ("latency model", manifest.kind),
        ("KV cache", kv_line(manifest)),
        ("trust", uncertainty_line(manifest)),
        *(("warning", warning) for warning in report.warnings),
        *(("corrected", f"{correction.name}: {correction.reason}") for correction in manifest.corrections),
        ("digest", report.digest),
    ]


def _surfaces(report: PackReport, compiled: CompiledPack) -> Section:
    from profiler.surface import surfaces_of
    from profiler.surface_png import draw_surfaces

    surfaces = surfaces_of(compiled)
    footer = f"{kv_line(report.manifest)}\n{uncertainty_line(report.manifest)}"
    with TemporaryDirectory(prefix="step-oracle-") as folder:
        path = Path(folder) / "surfaces.png"
        subtitle = f"{headline(report.manifest)}   |   {report.manifest.kind}"
        draw_surfaces(surfaces, path, title=report.manifest.name, subtitle=subtitle, footer=footer)
        png = path.read_bytes()
    holes = "cells without a sample" if compiled.manifest.kind == "sampled" else "cells the pack extrapolates to"
    text = f"Step latency as the server answers it, without scatter. Hatched: {holes}, the holes of its coverage."
    return Section("surfaces", "Latency surfaces", text, png)


def _judged(judged: JudgedSteps) -> list[Section]:
    errors = region_errors(judged)
    count = len(judged.queries)
    caution = (
        "The pack was made of these steps, so these are residuals of its fit and say little about others."
        if judged.is_made_of
        else "The pack does not name these steps among those it was made of."
    )
    if judged.left_out:
        caution += f" Left out, since it was made of them: {', '.join(judged.left_out)}."
    spread = "" if count == judged.steps_in_file else f" of {judged.steps_in_file}, evenly spread,"
    return [
        Section(
            "coverage",
            "Coverage",
            f"Where {count} steps{spread} of {judged.name} lie, and how well the pack backs its answers there.",
            png_of(figures.coverage_figure(judged)),
        ),
        Section(
            "errors",
            "Error by region",
            f"What the pack expects of a step (mean of {DRAWS} draws) beside what {judged.name} measured. {caution}",
            png_of(figures.error_figure(errors)),
            _error_table(errors),
        ),
        Section(
            "tails",
            "Residual tails",
            "How often a step takes more than so many times what is expected of it. The curves agree where the pack's "
            "scatter is the device's.",
            png_of(figures.tail_figure(judged)),
        ),
    ]


def _error_table(errors: list[RegionError]) -> Table:
    rows = [
        (
            error.region,
            str(error.steps),
            f"{error.mape:.2f}",
            f"{error.bias:+.2f}",
            f"{error.low:+.2f} to {error.high:+.2f}",
            f"{error.extrapolated:.0f}",
        )
        for error in errors
    ]
    heads = ("region", "steps", "mean absolute error %", "bias of the sum %", "middle 90 % of errors", "extrapolated %")
    return Table(heads, tuple(rows))


def _plan(plans: list[PlanProgress]) -> Section:
    rows = [
        (
            plan.run + ("" if plan.ended else " (interrupted)"),
            f"{plan.points[-1][0]:.1f}",
            *(str(number) for number in (plan.known, plan.visits, plan.points[-1][1], plan.points[-1][2])),
            str(plan.regions),
            "; ".join(f"{label}: {reason}" for label, reason in plan.left_out.items()) or "nothing",
        )
        for plan in plans
    ]
    return Section(
        "plan",
        "Capture plan",
        "What the plan knew when. A region is known when the standard error of its mean is below the plan's target, "
        "measured when it has the fewest steps that tell. Vertical lines: another run went on there.",
        png_of(figures.plan_figure(plans)),
        Table(
            ("run", "minutes", "known before", "visits", "known", "measured", "regions", "left out"),
            tuple(rows),
        ),
    )


def _measured(real: Path, emulated: Path) -> Section:
    measured, ours = read_measurement(real), read_measurement(emulated)
    rows = compare(measured, ours)
    return Section(
        "requests",
        "Real and emulated requests",
        f"What clients saw: {measured.name} is the real engine, {ours.name} the emulated one, in milliseconds. "
        "The picture ends at the 99.5th percentile.",
        png_of(figures.cdf_figure(measured, ours)),
        Table(("metric", "statistic", "real", "emulated", "error %"), tuple(_comparison(row) for row in rows)),
    )


def _comparison(row: Comparison) -> tuple[str, ...]:
    return (row.metric.upper(), row.statistic, f"{row.real:.2f}", f"{row.emulated:.2f}", f"{row.error_percent:+.2f}")
