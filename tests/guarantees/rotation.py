"""Tokens and certificates change while engines take steps: none fails."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from builders import build_composed_pack
from guarantees.row import Guarantee, Row, judged
from guarantees.shim_engines import ShimEngine, ShimFleet
from oracle_calls import Calls, decode, identity
from oracle_server.rpc.recompute import recompute_from
from secured_server import Certificates, SecuredServer

EXPERIMENT = "tenants/acme/experiments/default"


@dataclass(frozen=True)
class Sizes:
    tokens: int
    certificates: int
    engines: int
    # What each engine takes between two changes.
    steps: int = 10


LONG = Sizes(tokens=60, certificates=60, engines=20)
QUICK = Sizes(tokens=4, certificates=4, engines=8)


def run(folder: Path, sizes: Sizes) -> list[Row]:
    traces, certificates = folder / "traces", Certificates(folder / "tls")
    traces.mkdir()
    build_composed_pack(folder / "pack", ratios=[0.9, 1.0, 1.1])
    with SecuredServer(folder / "gated", certificates=certificates) as server:
        server.add_tenant("acme")
        with server.calls() as calls:
            calls.create(calls.upload(folder / "pack", "acme"), tenant="acme")
        token, name = server.issue("acme", "engine")

        def engine(number: int) -> ShimEngine:
            return ShimEngine(
                server.process.target,
                f"vllm-{number}",
                traces,
                seed=number,
                period_seconds=0.05,
                leases=number % 2 == 0,
                experiment=EXPERIMENT,
                access=server.access(token),
            )

        with ShimFleet(sizes.engines, engine) as fleet:
            fleet.go_on(sizes.steps)
            for _ in range(sizes.tokens):
                # Over the file that the engines read; the revocation ends every stream.
                _, newer = server.issue("acme", "engine")
                server.revoke(name)
                name = newer
                fleet.go_on(sizes.steps)
            after_tokens = fleet.steps
            for number in range(sizes.certificates):
                certificates.rotate()
                _new_engine(server.calls(token), number)
                fleet.go_on(sizes.steps)
        report = recompute_from(server.process.state_dir, sorted(traces.iterdir()))
    failures = fleet.failures
    holds = not failures and report.equal == fleet.steps and not report.different
    return [
        judged(
            "tokens and certificates rotate, no step fails",
            f"{sizes.tokens} tokens issued and revoked ({after_tokens:,} steps), {sizes.certificates} certificates "
            f"({fleet.steps - after_tokens:,} steps), {sizes.engines} shim clients over TLS",
            f"{len(failures)} failed, {report.equal:,} answers equal, {report.different} different"
            + (f": {'; '.join(failures[:2])}" if failures else ""),
            "0",
            holds=holds,
        )
    ]


def _new_engine(connection: Calls, number: int) -> None:
    """One that connects with the new certificate."""
    with connection as calls:
        assert calls.sample(identity(f"new-{number}", EXPERIMENT), [decode(0)])


GUARANTEE = Guarantee(run, LONG, QUICK)
