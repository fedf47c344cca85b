"""What two shards carry beside one process: CPU per message, and how evenly the kernel spreads the connections.

    python -m performance.shards [--engines 64] [--rounds 5]     (in tests/)

Shards share nothing while they answer, but one core cannot show the rate of two. So this measures, in turn, what one
process and one of two shards spend per message, at a Unix socket with one message in flight per engine; what the other
processes of the server spend meanwhile; and which share of twice as many TCP connections the fuller shard gets. Two
shards carry what one process does times cost of one / (cost of a shard x share of the fuller). A load is played short
and long, and the difference is taken: opening the streams is not counted.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from performance.measure import Spread, cpu_ns, plain, ratio_of_medians
from performance.packs import build_leasable_pack
from performance.servers import Ours, play

SHORT_STEPS, LONG_STEPS = 50, 400


def measure(folder: Path, *, rounds: int, engines: int) -> dict[str, Any]:
    """Median and range over the rounds, and the ratio with its interval."""
    build_leasable_pack(folder / "pack")
    one_costs, shard_costs, elsewhere, shares, loads = [], [], [], [], []
    listen = ("127.0.0.1:0", f"unix:{folder}/s")
    with Ours(folder / "one") as one, Ours(folder / "two", listen=listen, arguments=("--shards", "2")) as two:
        for server in (one, two):
            server.calls.create(server.calls.upload(folder / "pack"))
        shards = _shards(two)
        for _ in range(rounds):
            one_costs.append(_cost(one, one.target, engines, [one.process.pid])[one.process.pid])
            costs = _cost(two, two.process.targets[1], engines, [two.process.pid, *shards.values()])
            shard_costs.append(costs.pop(shards[0]))
            elsewhere.append(sum(costs.values()))
            spent = _spent(two, two.target, 2 * engines, SHORT_STEPS, shards.values()).values()
            shares.append(max(spent) / sum(spent))
            loads.append(shard_costs[-1] * shares[-1])
    ratio, low, high = ratio_of_medians(one_costs, loads)
    return {
        "engines": engines,
        "us_per_message_of_one_process": Spread.of(one_costs),
        "us_per_message_of_a_shard": Spread.of(shard_costs),
        "us_per_message_elsewhere": Spread.of(elsewhere),
        "share_of_the_fuller_shard": Spread.of(shares),
        "two_carry": {"ratio": ratio, "low": low, "high": high},
    }


def _cost(server: Ours, target: str, engines: int, pids: list[int]) -> dict[int, float]:
    """CPU us per message of each process."""
    short = _spent(server, target, engines, SHORT_STEPS, pids)
    long = _spent(server, target, engines, LONG_STEPS, pids)
    messages = engines * (LONG_STEPS - SHORT_STEPS)
    return {pid: (long[pid] - short[pid]) / messages / 1e3 for pid in pids}


def _spent(server: Ours, target: str, engines: int, steps: int, pids: Any) -> Mapping[int, int]:
    """CPU time in ns of each process for one load."""
    script = server.script(engines, steps)
    before = {pid: cpu_ns(pid) for pid in pids}
    play(script, target, tuple(pids), closed=True, max_seconds=120.0)
    return {pid: cpu_ns(pid) - before[pid] for pid in pids}


def _shards(server: Ours) -> dict[int, int]:
    """The process of each shard."""
    events = [json.loads(line) for line in server.process.log.splitlines() if re.match(r"{.*shard ready", line)]
    return {event["shard"]: event["pid"] for event in events}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=64, help="engines, one message in flight each")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="step-oracle-bench-") as folder:
        print(json.dumps(plain(measure(Path(folder), rounds=options.rounds, engines=options.engines)), indent=1))


if __name__ == "__main__":
    main()
