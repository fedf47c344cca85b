"""What `make demo` runs: two GPUs that are not there serve Qwen3-8B under load, and change into others while they do.

Everything is real but the device: vLLM's server, scheduler and KV cache run as they are, and vLLM's own benchmark
measures them. The packs come from published operator tables. The swap is one call of the oracle server.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.demo.interrupt import Interrupt
from deploy.demo.load import OUTPUTS, PROMPTS, SERVED_MODEL, LoadProcess
from deploy.demo.measurement import measure
from deploy.demo.packs import Pack, make_packs, step_costs
from deploy.demo.progress import DemoFailed, Progress, step_oracle, tail
from deploy.demo.report import Bound, Report, print_report, write_json
from deploy.demo.services import DOCTOR, EXPERIMENT, end_together, engine, environment, load_of, oracle, wait_ready
from engine_process import EngineProcess
from environments import VLLM_VERSIONS, shim_site
from model_dir import write_model_dir

ENGINES = ("engine-0", "engine-1")
LEAST_SECONDS = 12
# Two engines, two clients and the server share two cores and still answer on time at this rate.
REQUESTS_PER_SECOND = 2.5
SEED = 20260921
LOAD_BEGIN_SECONDS = 180.0


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    vllm: str
    seconds: int
    rate: float
    json: Path | None
    keep: Path | None


def main() -> int:
    """0: done; 1: something failed; 130: interrupted."""
    options = _options()
    interrupt, progress = Interrupt(), Progress()
    try:
        with _working_folder(options.keep) as folder:
            report = _run(options, folder, progress, interrupt)
        print()
        print_report(report)
        if options.json is not None:
            write_json(report, options.json)
            print(f"• the same figures: {options.json}")
        if faults := report.faults():
            raise DemoFailed("; ".join(faults), "make demo ARGS='--keep DIR' keeps the logs and traces that say why")
    except DemoFailed as failure:
        print(f"\nerror: {failure}\nnext:  {failure.next_step}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: everything the demo started has ended", file=sys.stderr)
        return 130
    return 0


def _run(options: Options, folder: Path, progress: Progress, interrupt: Interrupt) -> Report:
    """One run from nothing to the figures; whatever it starts has ended when it returns or raises."""
    progress.say(f"1/7 vLLM {options.vllm} without a GPU (the first time: minutes, 3 GB)")
    vllm, site = environment(options.vllm, interrupt), shim_site(folder / "site")
    progress.say("2/7 two profile packs of Qwen3-8B, from AIConfigurator's operator tables")
    model = write_model_dir(folder / SERVED_MODEL, "qwen3-8b")
    packs = make_packs(model, folder, options.vllm)
    names = " and ".join(f"{pack.device} ({pack.digest[:13]})" for pack in packs)
    progress.say(f"    {names}, {packs[0].kv_blocks:,} KV blocks each")
    with contextlib.ExitStack() as running:
        progress.say("3/7 the oracle server (the first time it compiles its kernels)")
        with interrupt.held():
            server = running.enter_context(oracle(folder / "state"))
        server.wait_ready()
        target = ("--target", server.target)
        _bind(packs, target)
        progress.say(f"4/7 two engines: vllm serve, attached to {server.target}, bound to the {packs[0].gpu} pack")
        traces = folder / "traces"
        traces.mkdir()
        with interrupt.held():
            # Made here too: interrupted between its making and the note of it, the folder would stay.
            scratch = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="step-oracle-")))
            engines = {
                name: running.enter_context(
                    engine(name, vllm, model, site=site, target=server.target, folder=folder, scratch=scratch)
                )
                for name in ENGINES
            }
            running.callback(end_together, tuple(engines.values()))
        wait_ready(engines)
        requests = round(options.rate * options.seconds)
        progress.say(
            f"5/7 load: vllm bench serve on each, {requests} requests at {options.rate:g}/s (Poisson), "
            f"{PROMPTS.least}-{PROMPTS.most} + {OUTPUTS.least}-{OUTPUTS.most} tokens"
        )
        with interrupt.held():
            clients = {
                name: running.enter_context(
                    LoadProcess(
                        vllm,
                        target_engine,
                        model=model,
                        site=site,
                        folder=folder / f"load-{name}",
                        scratch=scratch,
                        requests_per_second=options.rate,
                        requests=requests,
                        seed=SEED + number,
                    )
                )
                for number, (name, target_engine) in enumerate(engines.items())
            }
        _wait_for_load(traces, clients, progress)
        _watch(progress, engines, clients, seconds=options.seconds / 2)
        begin = time.monotonic()
        _activate(packs[1], target)
        activate_seconds = time.monotonic() - begin
        progress.say(f"6/7 swapped: every engine is an {packs[1].gpu} now, generation 2; the load goes on")
        _watch(progress, engines, clients, seconds=None)
        progress.say("7/7 figures: every recorded reply is computed again from the stored packs")
        end_together(tuple(engines.values()))
        paths = [traces / f"{name}.trace" for name in ENGINES]
        recomputed = _recompute(paths, folder / "state")
    measured = {name: measure(clients[name].result_path(), traces / f"{name}.trace", (1, 2)) for name in ENGINES}
    steps = (
        [step for each in measured.values() for step in each.steps_before],
        [step for each in measured.values() for step in each.steps_after],
    )
    before, after = (
        Bound(pack.gpu, pack.device, pack.digest, generation, step_costs(pack, steps[generation - 1]))
        for generation, pack in enumerate(packs, start=1)
    )
    return Report(
        vllm_version=options.vllm,
        model=SERVED_MODEL,
        requests_per_second=options.rate,
        kv_blocks=packs[0].kv_blocks,
        before=before,
        after=after,
        engines={name: each.engine for name, each in measured.items()},
        replies_recomputed_equal=recomputed["equal"],
        replies_recomputed_different=recomputed["different"],
        activate_seconds=activate_seconds,
        total_seconds=progress.seconds,
    )


def _bind(packs: tuple[Pack, Pack], target: tuple[str, str]) -> None:
    step_oracle("pack", "upload", *(str(pack.folder) for pack in packs), *target, next_step=DOCTOR)
    step_oracle("experiment", "create", EXPERIMENT, "--pack", packs[0].digest, *target, next_step=DOCTOR)


def _activate(pack: Pack, target: tuple[str, str]) -> None:
    next_step = "the reason above names the cold fields that differ; they are pinned in deploy/demo/packs.py"
    step_oracle("experiment", "activate", EXPERIMENT, "--pack", pack.digest, *target, next_step=next_step)


def _recompute(traces: list[Path], state_dir: Path) -> Mapping[str, int]:
    arguments = ("recompute", *map(str, traces), "--state-dir", str(state_dir), "--json")
    report: Mapping[str, int] = json.loads(step_oracle(*arguments, next_step="report it: answers must be pure"))
    return report


def _wait_for_load(traces: Path, clients: Mapping[str, LoadProcess], progress: Progress) -> None:
    """Until every engine has run a step: the clients import vLLM first, which takes a while."""
    end = time.monotonic() + LOAD_BEGIN_SECONDS
    # An engine's trace holds one record of under 2 kB before its first step.
    while not all((traces / f"{name}.trace").stat().st_size > 2048 for name in clients):
        if _running(clients) < len(clients) or time.monotonic() > end:
            raise DemoFailed(f"no load reached the engines in {LOAD_BEGIN_SECONDS:.0f} s", DOCTOR)
        time.sleep(0.1)
    progress.say("    both clients send")


def _watch(
    progress: Progress, engines: Mapping[str, EngineProcess], clients: Mapping[str, LoadProcess], seconds: float | None
) -> None:
    """Tell how far the load is, for a while or until every client has ended."""
    begin = told = time.monotonic()
    while _running(clients):
        now = time.monotonic()
        if seconds is not None and now - begin >= seconds:
            return
        for name, served in engines.items():
            if served.returncode is not None:
                raise DemoFailed(f"{name} ended with {served.returncode} under load:\n{tail(served.log_path)}", DOCTOR)
        if now - told >= 10:
            told = now
            progress.say("    " + "; ".join(f"{name}: {load_of(served)}" for name, served in engines.items()))
        time.sleep(0.25)


def _running(clients: Mapping[str, LoadProcess]) -> int:
    """How many clients still send; asks all of them, since one that failed raises."""
    return sum(client.is_running() for client in clients.values())


@contextlib.contextmanager
def _working_folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="step-oracle-demo-") as name:
            yield Path(name)
        return
    if keep.exists() and any(keep.iterdir()):
        raise DemoFailed(f"--keep {keep} is not empty", "give a folder that does not exist yet")
    keep.mkdir(parents=True, exist_ok=True)
    yield keep.resolve()


def _options() -> Options:
    parser = argparse.ArgumentParser(prog="make demo ARGS=...", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--vllm", default=VLLM_VERSIONS[-1], metavar="VERSION", help="default: %(default)s")
    parser.add_argument("--seconds", type=int, default=60, help="length of the load, swap in the middle (%(default)s)")
    parser.add_argument(
        "--rate", type=float, default=REQUESTS_PER_SECOND, help="requests per second and engine (%(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same figures there")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="work in this new folder and leave it: logs, traces, packs"
    )
    given = parser.parse_args()
    if given.seconds < LEAST_SECONDS or not given.rate > 0:
        parser.error(f"--seconds is at least {LEAST_SECONDS} and --rate above 0")
    if given.json is not None and not given.json.absolute().parent.is_dir():
        parser.error(f"--json {given.json}: the folder does not exist; make it first")
    return Options(given.vllm, given.seconds, given.rate, given.json, given.keep)


if __name__ == "__main__":
    sys.exit(main())
