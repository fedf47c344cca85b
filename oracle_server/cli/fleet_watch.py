"""A server polled for its fleet, and what became of the connection meanwhile."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from grpc_health.v1 import health_pb2

from oracle_server.cli.fleet import Counts, EnginePoll, ExperimentPoll, Fleet, Poll, View
from oracle_server.rpc.client import Client, Refused, Unreachable
from step_oracle.v1 import experiment_pb2, pack_pb2, tenant_pb2

POLL_SECONDS = 5.0
NOTE_SECONDS = 60.0


class FleetWatch:
    """Polls one server and remembers what became of it. Owned by the loop that polls."""

    # Of the last answer; from the first poll on.
    view: View

    def __init__(self, client: Client, only: str | None, tenant: str | None) -> None:
        self._client = client
        self._only = only
        self._tenant = tenant
        self._fleet = Fleet()
        # By (tenant, digest).
        self._pack_names: dict[tuple[str, str], str] = {}
        self._silent_since: float | None = None
        self._why_silent = ""
        self._event, self._event_at = "", 0.0

    @property
    def fresh(self) -> bool:
        """False while the server does not answer and the view is of before."""
        return self._silent_since is None

    def poll_once(self) -> bool:
        """Ask the server; whether it was restarted since the last time. Unreachable, Refused."""
        self.view, restarted = self._fleet.advance(self._ask())
        return restarted

    def poll(self) -> None:
        """Ask the server; where it does not answer, or not yet, say so and keep the view."""
        try:
            restarted = self.poll_once()
        except (Unreachable, Refused) as error:
            if isinstance(error, Refused) and error.code != "UNAVAILABLE":
                raise
            if self._silent_since is None:
                self._silent_since = time.monotonic()
            self._why_silent = "not ready" if isinstance(error, Refused) else "no answer"
            return
        if self._silent_since is not None:
            away = time.monotonic() - self._silent_since
            self._silent_since = None
            self._say(f"the server answers again after {away:.0f} s")
        if restarted:
            self._say("the server was restarted: its counts began anew")

    def note(self) -> str:
        """What to tell about the connection."""
        if self._silent_since is not None:
            away = time.monotonic() - self._silent_since
            return f"{self._why_silent} for {away:.0f} s; the figures below are of the last answer. Trying again"
        return self._event if time.monotonic() - self._event_at < NOTE_SECONDS else ""

    def _say(self, event: str) -> None:
        self._event, self._event_at = f"{datetime.now(UTC):%H:%M:%SZ}: {event}", time.monotonic()

    def _ask(self) -> Poll:

        call = self._client.call
        request = health_pb2.HealthCheckRequest(service="step_oracle.v1.OracleService")
        status = call(self._client.health.Check, request, POLL_SECONDS).status
        experiments, engines = [], []
        for experiment in self._experiments():
            tenant = experiment.name.split("/")[1]
            digests = [rule.pack_digest for rule in experiment.binding.rules] + [experiment.binding.default_pack_digest]
            packs = tuple(self._pack(tenant, digest) for digest in dict.fromkeys(filter(None, digests)))
            experiments.append(ExperimentPoll(experiment.name, experiment.generation, packs))
            engines += [self._engine(experiment.name, tenant, engine) for engine in self._engines(experiment.name)]
        health = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
        return Poll(time.monotonic(), health, tuple(experiments), tuple(engines))

    def _experiments(self) -> Iterator[Any]:

        client = self._client
        if self._only is not None:
            request = experiment_pb2.GetExperimentRequest(name=self._only)
            yield client.call(client.experiments.GetExperiment, request, POLL_SECONDS).experiment
            return
        if self._tenant is not None:
            parents = [f"tenants/{self._tenant}"]
        else:
            listing = tenant_pb2.ListTenantsRequest()
            parents = [tenant.name for tenant in client.pages(client.tenants.ListTenants, listing, "tenants")]
        for parent in parents:
            page = experiment_pb2.ListExperimentsRequest(parent=parent)
            yield from client.pages(client.experiments.ListExperiments, page, "experiments")

    def _engines(self, experiment: str) -> Any:

        request = experiment_pb2.ListEnginesRequest(parent=experiment)
        try:
            return self._client.call(self._client.experiments.ListEngines, request, POLL_SECONDS).engines
        except Refused as error:
            # Deleted since it was listed.
            if error.reason == "EXPERIMENT_NOT_FOUND" and self._only is None:
                return ()
            raise

    def _engine(self, experiment: str, tenant: str, engine: Any) -> EnginePoll:
        return EnginePoll(
            experiment=experiment,
            engine_id=engine.engine_id,
            incarnation=engine.incarnation,
            pack=self._pack(tenant, engine.pack_digest),
            generation=engine.generation,
            streaming=engine.streaming,
            counts=Counts(
                steps=engine.steps,
                extrapolated_steps=engine.extrapolated_steps,
                leased_steps=engine.leased_steps,
                late_answers=engine.late_answers,
                reconnects=engine.reconnects,
                lateness_buckets=tuple(engine.lateness_buckets),
            ),
            over_rate=engine.degraded,
        )

    def _pack(self, tenant: str, digest: str) -> str:
        """Its name and the beginning of its digest; asked for once."""
        key = (tenant, digest)
        if key not in self._pack_names:
            self._pack_names[key] = f"{self._pack_name(tenant, digest)}@{digest.removeprefix('sha256:')[:6]}"
        return self._pack_names[key]

    def _pack_name(self, tenant: str, digest: str) -> str:

        request = pack_pb2.GetPackRequest(name=f"tenants/{tenant}/packs/{digest}")
        try:
            pack = self._client.call(self._client.packs.GetPack, request, POLL_SECONDS).pack
            return str(json.loads(pack.manifest_json)["name"])
        except Refused as error:
            if error.code == "UNAVAILABLE":
                raise
            return "?"
