"""The client load: vLLM's own benchmark, Poisson arrivals, a chat-like mix of lengths."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from deploy.demo.progress import DemoFailed, tail
from engine_process import EngineProcess, engine_variables
from environments import VllmEnvironment

SERVED_MODEL = "Qwen3-8B"
WARMUPS = 2


@dataclass(frozen=True)
class LengthMix:
    """Log-normal tokens, cut at both ends: the long right tail of chat traffic, small enough for a short run."""

    median: float
    sigma: float
    least: int
    most: int

    def draw(self, source: random.Random) -> int:
        """One length in tokens."""
        return min(self.most, max(self.least, round(source.lognormvariate(0.0, self.sigma) * self.median)))


# Means of about 380 and 100 tokens. The ShareGPT reader of vLLM drops prompts above 1,024 tokens.
PROMPTS = LengthMix(median=320, sigma=0.8, least=50, most=1000)
OUTPUTS = LengthMix(median=85, sigma=0.6, least=20, most=300)


def write_dataset(
    path: Path,
    model: Path,
    *,
    requests: int,
    seed: int,
    prompts: LengthMix = PROMPTS,
    outputs: LengthMix = OUTPUTS,
) -> None:
    """A file in ShareGPT's format, which is the one of vLLM's datasets that needs no pandas; one request per entry.

    The texts are made of words the model's tokenizer has as one token each, so that lengths are as drawn; two prompts
    share no beginning, so the prefix cache helps neither.
    """
    vocabulary = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    space = "\u0120"  # a space in a byte-level vocabulary
    words = sorted(word[1:] for word in vocabulary if word.startswith(space) and word[1:].isalpha() and len(word) > 2)
    source = random.Random(seed)  # noqa: S311

    def text(mix: LengthMix) -> str:
        return "".join(f" {source.choice(words)}" for _ in range(mix.draw(source)))

    entries = [
        {"conversations": [{"from": "human", "value": text(prompts)}, {"from": "gpt", "value": text(outputs)}]}
        for _ in range(requests)
    ]
    path.write_text(json.dumps(entries), encoding="utf-8")


class LoadProcess:
    """One `vllm bench serve` against one engine, in its own process group; use as a context manager."""

    def __init__(
        self,
        environment: VllmEnvironment,
        engine: EngineProcess,
        *,
        model: Path,
        site: Path,
        folder: Path,
        scratch: Path,
        requests_per_second: float,
        requests: int,
        seed: int,
    ) -> None:
        """Dataset, log and result go into `folder`, temporary files into `scratch`."""
        folder.mkdir(parents=True)
        dataset = folder / "requests.json"
        write_dataset(dataset, model, requests=requests, seed=seed)
        self.log_path = folder / "client.log"
        self._result = folder / "result.json"
        command = [str(environment.python), "-m", "vllm.entrypoints.cli.main", "bench", "serve"]
        command += ["--base-url", engine.base_url, "--model", str(model), "--served-model-name", SERVED_MODEL]
        command += ["--dataset-name", "sharegpt", "--dataset-path", str(dataset), "--disable-shuffle", "--ignore-eos"]
        command += ["--num-prompts", str(requests)]
        command += ["--request-rate", str(requests_per_second), "--seed", str(seed), "--num-warmups", str(WARMUPS)]
        command += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--disable-tqdm"]
        command += ["--save-result", "--save-detailed", "--result-dir", str(folder), "--result-filename", "result.json"]
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=engine_variables(site, None) | {"TMPDIR": str(scratch)},
                start_new_session=True,
            )

    def __enter__(self) -> LoadProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def is_running(self) -> bool:
        """False once it ended well. Raises DemoFailed when it ended badly."""
        status = self._process.poll()
        if status:
            raise DemoFailed(
                f"vllm bench serve ended with {status}:\n{tail(self.log_path)}",
                "the lines above are the client's; make demo ARGS='--keep DIR' keeps the engines' logs too",
            )
        return status is None

    def result_path(self) -> Path:
        """The result file of a client that has ended."""
        if not self._result.exists():
            raise DemoFailed(
                f"vllm bench serve wrote no result:\n{tail(self.log_path)}",
                "the lines above are the client's; make demo ARGS='--keep DIR' keeps the engines' logs too",
            )
        return self._result
