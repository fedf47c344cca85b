"""kill -9 at any point leaves the state before or after a change, and an acknowledged change survives."""

from __future__ import annotations

import random
import shutil
import threading
import time
from pathlib import Path

import grpc
import pytest

from builders import build_constant_pack
from oracle_calls import EXPERIMENT, TIMEOUT, Calls, decode, identity
from oracle_process import OracleFailed, OracleProcess
from oracle_server.errors import OracleError
from sharded_server import wait_for
from step_oracle.v1 import experiment_pb2, pack_pb2

ROUNDS = 6


def test_killed_during_uploads_and_activations_it_has_what_it_acknowledged(
    server: OracleProcess, tmp_path: Path
) -> None:
    """Clients change packs and generations as fast as they can; the moment of each kill is drawn."""
    draw = random.Random(20)
    acknowledged_packs: set[str] = set()
    offered_packs: set[str] = set()
    acknowledged_generation = attempted_generation = 1
    latency = 1_000_000
    build_constant_pack(tmp_path / "first", latency_ns=latency)
    with Calls(server.target) as calls:
        base = calls.upload(tmp_path / "first")
        calls.create(base, seed=1)
    for number in range(ROUNDS):
        stop = threading.Event()

        def upload_all(stop: threading.Event = stop, number: int = number) -> None:
            i = 0
            while not stop.is_set():
                i += 1
                digest = build_constant_pack(tmp_path / f"{number}-{i}", latency_ns=1_000_000 + 1000 * number + i)
                offered_packs.add(digest)
                try:
                    with Calls(server.target) as own:
                        acknowledged_packs.add(own.upload(tmp_path / f"{number}-{i}"))
                except OracleError:
                    return

        def activate_all(stop: threading.Event = stop) -> None:
            nonlocal acknowledged_generation, attempted_generation
            with Calls(server.target) as own:
                while not stop.is_set():
                    attempted_generation = acknowledged_generation + 1
                    try:
                        response = own.activate(base, seed=attempted_generation)
                    except grpc.RpcError:
                        return
                    acknowledged_generation = response.experiment.generation

        threads = [threading.Thread(target=upload_all), threading.Thread(target=activate_all)]
        for thread in threads:
            thread.start()
        # On a slow machine no upload may be over by any of the moments.
        wait_for(lambda: bool(number or acknowledged_packs))  # noqa: B023 - called at once
        time.sleep(draw.uniform(0.2, 1.2))
        server.kill()
        stop.set()
        for thread in threads:
            thread.join()
        server.start()
        with Calls(server.target) as calls:
            request = pack_pb2.ListPacksRequest(parent="tenants/default", page_size=1000)
            stored = {pack.digest for pack in calls.client.pages(calls.packs.ListPacks, request, "packs")} - {base}
            assert acknowledged_packs <= stored <= offered_packs
            folders = {path.name for path in (server.state_dir / "packs").iterdir()}
            assert folders == {digest.removeprefix("sha256:") for digest in stored | {base}}
            assert {path.name for path in (server.state_dir / "compiled").iterdir()} == folders
            assert list((server.state_dir / "incoming").iterdir()) == []
            experiment = calls.experiments.GetExperiment(
                experiment_pb2.GetExperimentRequest(name=EXPERIMENT), timeout=TIMEOUT
            ).experiment
            assert experiment.generation in (acknowledged_generation, attempted_generation)
            assert experiment.binding.seed == experiment.generation
            assert calls.sample(identity("e"), [decode(0)])[0].generation == experiment.generation
            acknowledged_generation = experiment.generation
            for digest in list(stored)[:1]:
                calls.create(digest, experiment_id=f"round-{number}")
    assert acknowledged_generation > ROUNDS
    assert acknowledged_packs


def test_a_lost_compiled_pack_is_compiled_again_before_ready(server: OracleProcess, pack_dirs: dict[str, Path]) -> None:
    with Calls(server.target) as calls:
        digest = calls.upload(pack_dirs["composed"])
        calls.create(digest)
        before = calls.sample(identity("e"), [decode(0)])
    assert server.terminate() == 0
    shutil.rmtree(server.state_dir / "compiled")
    server.start()
    with Calls(server.target) as calls:
        assert calls.sample(identity("e"), [decode(0)]) == before


def test_a_damaged_stored_pack_is_told_at_the_start(server: OracleProcess, pack_dirs: dict[str, Path]) -> None:
    with Calls(server.target) as calls:
        digest = calls.upload(pack_dirs["composed"])
    server.terminate()
    shutil.rmtree(server.state_dir / "compiled")
    (server.state_dir / "packs" / digest.removeprefix("sha256:") / "operators.parquet").write_bytes(b"damaged")
    with pytest.raises(OracleFailed) as caught:
        server.start()
    assert server.returncode == 1
    assert "is damaged" in str(caught.value)


def test_what_a_crash_left_is_removed(server: OracleProcess, pack_dirs: dict[str, Path]) -> None:
    server.terminate()
    for folder in ("packs", "compiled", "incoming"):
        (server.state_dir / folder / ("ab" * 32)).mkdir()
        (server.state_dir / folder / "stray").write_bytes(b"")
    server.start()
    for folder in ("packs", "compiled", "incoming"):
        assert list((server.state_dir / folder).iterdir()) == []
    with Calls(server.target) as calls:
        assert calls.upload(pack_dirs["constant"])


def test_two_servers_never_share_a_folder(server: OracleProcess) -> None:
    second = OracleProcess(server.state_dir)
    second.stdout_path = server.state_dir.parent / "second.stdout"
    second.stderr_path = server.state_dir.parent / "second.stderr"
    with pytest.raises(OracleFailed) as caught:
        second.start()
    assert second.returncode == 1
    assert "another server has the state folder" in str(caught.value)
    assert server.is_serving()
