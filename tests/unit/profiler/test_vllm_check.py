"""vllm-check on wheels of a few lines: what moved is found, and what did not is not reported."""

from __future__ import annotations

import functools
import http.server
import json
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from environments import REPOSITORY
from oracle_server import vllm_env
from profiler.cli import main
from profiler.vllm_check.declared import ABSENCES, BEHAVIORS, CHOSEN_BASES, NEEDED
from profiler.vllm_check.drift import moves, snapshot_of
from profiler.vllm_check.finding import Finding
from profiler.vllm_check.fit import findings_of
from profiler.vllm_check.ours import Ours
from profiler.vllm_check.own_source import OwnSource
from profiler.vllm_check.releases import open_release, release_order
from profiler.vllm_check.verdict import Verdict, data, markdown
from small_wheels import write_wheel

# What stands for vLLM: an abstract class in a package that re-exports it, a dataclass, a configuration.
_BASE = """
from abc import ABC, abstractmethod
from vllm.config import Config
from vllm.output import Output

class Runner(ABC):
    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def run(self, output: Output, non_block: bool = False) -> int:
        raise NotImplementedError

    @classmethod
    def describe(cls) -> str:
        return "runner"
"""
_OUTPUT = """
from dataclasses import dataclass, field

@dataclass
class Item:
    name: str

@dataclass
class Output:
    ids: list[str]
    items: list[Item]
    total: int
    notes: dict[str, str] = field(default_factory=dict)
"""
_CONFIG = """
from vllm.sizes import Sizes

class Config:
    sizes: Sizes
    depth: int = 1

    @property
    def is_deep(self) -> bool:
        return self.depth > 1
"""
_SIZES = "class Sizes:\n    limit: int = 8\n"
_FILES = {
    "vllm/__init__.py": "",
    "vllm/run/__init__.py": "from .base import Runner\n",
    "vllm/run/base.py": _BASE,
    "vllm/output.py": _OUTPUT,
    "vllm/config.py": _CONFIG,
    "vllm/sizes.py": _SIZES,
}
BASE, OUTPUT, CONFIG = "vllm/run/base.py", "vllm/output.py", "vllm/config.py"
STOP = "    @abstractmethod\n    def stop(self) -> None: ...\n\n    @classmethod"
# What stands for our source.
_OURS = """
from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.output import Output
from vllm.run import Runner

if TYPE_CHECKING:
    from vllm.config import Config


class OurRunner(Runner):
    def run(self, output: Output, non_block: bool = False) -> int:
        for item in output.items:
            print(item.name, self.config.sizes.limit)
        return getattr(output, "extra", 0)

    @classmethod
    def describe(cls) -> str:
        return "ours"


def make(config: Config) -> Output:
    sizes, depth = config.sizes, config.depth
    return Output(ids=[], items=[], total=sizes.limit if config.is_deep else depth)
"""


def _findings(tmp_path: Path, *, files: Mapping[str, str] | None = None, ours: str = _OURS) -> list[Finding]:
    wheel = write_wheel(tmp_path / "wheels", "vllm", "1.0.0", files={**_FILES, **(files or {})})
    with open_release(str(wheel), print) as vllm:
        return findings_of(vllm, _ours(tmp_path, ours))


def _ours(tmp_path: Path, source: str, module: str = "mine", part: str = "mine") -> Ours:
    path = tmp_path / f"{module.replace('.', '/')}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
    package = tmp_path / module.partition(".")[0]
    if not package.is_dir():
        package.mkdir()
        path = path.rename(package / "__init__.py")
    return Ours(OwnSource({part: (package.name,)}, root=tmp_path))


def _broken(findings: list[Finding]) -> list[str]:
    return [finding.what for finding in findings if finding.severity == "breaks"]


def test_a_release_with_everything_in_place_breaks_nothing(tmp_path: Path) -> None:
    findings = _findings(tmp_path)

    assert _broken(findings) == []
    told = [finding.what for finding in findings]
    assert told == ["no Output.extra: a default stands in"]


@pytest.mark.parametrize(
    ("file", "old", "new", "sentence"),
    [
        (OUTPUT, "    total: int\n", "    count: int\n", "Output(ids, items, count, notes=...) has no parameter total"),
        (OUTPUT, "    total: int\n", "    total: int\n    rank: int\n", "needs rank, which we do not give"),
        (OUTPUT, "    items: list[Item]\n", "", "vllm.output.Output has no items"),
        (OUTPUT, "    name: str", "    title: str", "vllm.output.Item has no name"),
        ("vllm/sizes.py", "limit", "bound", "vllm.sizes.Sizes has no limit"),
        (CONFIG, "is_deep", "is_long", "vllm.config.Config has no is_deep"),
        (BASE, "def describe", "def explain", "Runner has no describe: OurRunner.describe is never called"),
        ("vllm/run/__init__.py", "import Runner", "import Runner as Racer", "vllm.run has no Runner"),
        (BASE, "non_block: bool = False", "blocking: bool = True", "parameter 2 is blocking, ours is non_block"),
        (BASE, "non_block: bool", "more: int = 0, non_block: bool", "parameter 2 is more, ours is non_block"),
        (BASE, "bool = False", "bool = False, *, more: int = 0", "has a parameter more, ours has not"),
        (BASE, "output: Output, ", "", "parameter 1 is non_block, ours is output"),
        (BASE, "    @classmethod", STOP, "Runner.stop is abstract and OurRunner does not define it"),
    ],
)  # fmt: skip
def test_what_moved_is_found_and_named(tmp_path: Path, file: str, old: str, new: str, sentence: str) -> None:
    assert old in _FILES[file]

    broken = _broken(_findings(tmp_path, files={file: _FILES[file].replace(old, new)}))

    assert [what for what in broken if sentence in what], broken


def test_a_finding_names_the_file_and_line_of_ours(tmp_path: Path) -> None:
    findings = _findings(tmp_path, files={"vllm/sizes.py": "class Sizes:\n    pass\n"})

    lines = _OURS.splitlines()
    named = {finding.where for finding in findings if finding.severity == "breaks"}
    assert {f"mine/__init__.py:{number}" for number, line in enumerate(lines, 1) if ".limit" in line} == named


def test_an_inherited_member_counts_as_there(tmp_path: Path) -> None:
    moved_up = "class Bound:\n    limit: int = 8\n\nclass Sizes(Bound):\n    pass\n"

    assert _broken(_findings(tmp_path, files={"vllm/sizes.py": moved_up})) == []


def test_a_class_with_a_base_outside_vllm_is_not_accused(tmp_path: Path) -> None:
    foreign = "from torch.nn import Module\n\nclass Sizes(Module):\n    pass\n"

    assert _broken(_findings(tmp_path, files={"vllm/sizes.py": foreign})) == []


def test_a_module_that_makes_a_name_on_demand_has_it(tmp_path: Path) -> None:
    lazy = 'def __getattr__(name):\n    if name == "Runner":\n        from .base import Runner\n        return Runner\n'

    assert "vllm.run has no Runner" not in _broken(_findings(tmp_path, files={"vllm/run/__init__.py": lazy}))


def test_an_import_that_may_fail_is_no_break(tmp_path: Path) -> None:
    ours = "try:\n    from vllm.output import Gone\nexcept ImportError:\n    Gone = None\n"

    findings = _findings(tmp_path, ours=ours)

    severities = [finding.severity for finding in findings]
    assert severities == ["handled"]


_CORE = """
class EngineCore:
    def step(self):
        future = self.model_executor.execute_model(None, non_block=True)
        return future.result()

    def step_with_batch_queue(self):
        if self.batch_queue[-1][0].done():
            return self.batch_queue.pop()[0].result()

    def warm(self):
        self.model_executor.collective_rpc("warm")
"""
_OUR_SHIM = """
from concurrent.futures import Future

_CALLS_WITHOUT_EFFECT = ("warm",)

class DeadlineFuture(Future):
    def done(self): ...
    def result(self, timeout=None): ...

class StepOracleExecutor:
    def _rpc_size(self): ...
"""


def _shim_findings(tmp_path: Path, core: str) -> list[str]:
    files = {
        "vllm/__init__.py": "",
        "vllm/v1/engine/core.py": core,
        "vllm/plugins/__init__.py": 'A = "vllm.platform_plugins"\nB = "vllm.general_plugins"\n',
    }
    for module in ("timeline", "executor"):
        path = tmp_path / "vllm_shim" / f"{module}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(_OUR_SHIM, encoding="utf-8")
    wheel = write_wheel(tmp_path / "wheels", "vllm", "1.0.0", files=files)
    ours = Ours(OwnSource({"shim": ("vllm_shim",)}, root=tmp_path))
    # Behaviours and classes this wheel does not have are other tests' business.
    ours.behaviors, ours.uses = [], []
    with open_release(str(wheel), print) as vllm:
        return _broken(findings_of(vllm, ours))


def test_a_future_is_asked_only_what_ours_answers(tmp_path: Path) -> None:
    assert _shim_findings(tmp_path, _CORE) == []

    asked = _CORE.replace("future.result()", "future.add_done_callback(print)")
    assert _shim_findings(tmp_path, asked) == [
        "EngineCore.step calls add_done_callback() of a step's Future, which ours does not define"
    ]


def test_a_worker_call_nobody_answers_is_found(tmp_path: Path) -> None:
    asked = _CORE.replace('"warm"', '"weigh"')

    assert _shim_findings(tmp_path, asked) == ["EngineCore.warm asks the worker for weigh, which nobody answers"]


def test_a_clock_that_replay_does_not_replace_is_found(tmp_path: Path) -> None:
    replay = tmp_path / "profiler" / "replay"
    replay.mkdir(parents=True)
    (replay / "clock.py").write_text('_STAMPING_MODULES = ("vllm.v1.request",)\n', encoding="utf-8")
    files = {
        "vllm/__init__.py": "",
        "vllm/v1/request.py": "import time\n\ndef stamp():\n    return time.time()\n",
        "vllm/v1/core/queue.py": "import time\n\ndef stamp():\n    return time.monotonic()\n",
        "vllm/v1/core/idle.py": "import time\n\ndef rest():\n    time.sleep(1)\n",
    }
    wheel = write_wheel(tmp_path / "wheels", "vllm", "1.0.0", files=files)
    ours = Ours(OwnSource({"replay": ("profiler.replay",)}, root=tmp_path))
    ours.uses = []

    with open_release(str(wheel), print) as vllm:
        assert _broken(findings_of(vllm, ours)) == [
            "vllm.v1.core.queue reads the clock on a request's path, which replay leaves alone"
        ]


def test_what_moved_between_two_releases_is_listed_line_by_line(tmp_path: Path) -> None:
    ours = _ours(tmp_path, _OURS)
    later = {
        **_FILES,
        "vllm/output.py": _OUTPUT.replace("    total: int\n", "    total: int = 0\n"),
        "vllm/run/base.py": _BASE.replace("non_block: bool = False", "non_block: bool = False, more: int = 0"),
        "vllm/config.py": _CONFIG.replace("    depth: int = 1\n", ""),
    }
    snapshots = []
    for version, files in (("1.0.0", _FILES), ("1.1.0", later)):
        with open_release(str(write_wheel(tmp_path / "wheels", "vllm", version, files=files)), print) as vllm:
            snapshots.append(snapshot_of(vllm, ours))

    assert moves(*snapshots) == [
        "- Config.depth (field)",
        "~ Runner.run: abstract method(output, non_block=...) -> abstract method(output, non_block=..., more=...)",
    ]
    assert moves(snapshots[0], snapshots[0]) == []


def test_releases_are_ordered_by_their_numbers() -> None:
    versions = sorted(["0.19.0", "0.18.1.post1", "0.9.2", "0.18.1"], key=release_order)

    assert versions == ["0.9.2", "0.18.1", "0.18.1.post1", "0.19.0"]


def test_a_release_that_does_not_fit_ends_the_command_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = write_wheel(tmp_path, "vllm", "9.9.9", files={"vllm/__init__.py": ""})

    status = main(["vllm-check", str(wheel), "--json"])

    told = json.loads(capsys.readouterr().out)
    assert (status, [release["version"] for release in told["releases"]]) == (1, ["9.9.9"])
    assert told["releases"][0]["verdict"] == "does not fit"
    assert "vllm.v1.executor.abstract has no Executor" in {f["what"] for f in told["releases"][0]["findings"]}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "--all"),
        (["0.9.0"], "0.18.1"),
        (["nothing.whl"], "nor a wheel file"),
        (["--json", "--markdown", "0.33.0"], "exclude"),
    ],
)
def test_wrong_arguments_end_the_command_with_2(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["vllm-check", *arguments]) == 2
    assert word in capsys.readouterr().err


def test_a_wheel_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vllm-check", str(write_wheel(tmp_path, "other", "1.0"))]) == 2
    assert "no wheel of vLLM" in capsys.readouterr().err


def test_the_table_has_a_row_per_release_and_says_what_breaks() -> None:
    breaks = Finding("shim", "breaks", "Executor.run is abstract", "vllm_shim/executor.py:1")
    handled = Finding("replay", "handled", "no Thing: a default stands in", "profiler/replay/engine.py")
    verdicts = [
        Verdict("1.0.0", ("shim", "replay"), (handled,), "", ()),
        Verdict("1.1.0", ("shim", "replay"), (breaks, handled), "1.0.0", ("+ Executor.run (method())",)),
    ]

    lines = markdown(verdicts).splitlines()

    assert "| 1.1.0 | **no** | fits * | 1 | 1 | 1 |" in lines
    assert "| 1.0.0 | fits | fits * | 1 | 0 |  |" in lines
    assert any(line.startswith("- 1.0.0 to 1.1.0: no Thing") for line in lines)
    assert data(verdicts)["releases"][1]["parts"] == {"shim": "does not fit", "replay": "fits, differences handled"}


def test_every_declared_name_of_ours_is_there() -> None:
    source = OwnSource()
    paths = {file.path for file in source.files} | {"pyproject.toml"}
    declared = [use.where for use in NEEDED] + [handled.where for handled in ABSENCES.values()]
    declared += [behavior.where for behavior in BEHAVIORS]

    assert set(CHOSEN_BASES) <= set(source.classes)
    assert set(declared) <= paths
    assert source.parts == ("shim", "replay", "capture")


def test_uses_are_read_out_of_our_own_source() -> None:
    told = {f"{use.part} {use}{'?' if use.optional else ''}" for use in Ours(OwnSource()).uses}

    assert {
        "shim SchedulerOutput.num_scheduled_tokens",
        "shim CachedRequestData.num_output_tokens",
        "shim VllmConfig.parallel_config.data_parallel_index",
        "shim SamplingParams.eos_token_id",
        "shim NewRequestData.prefill_token_ids?",
        "replay EngineCore.scheduler.has_requests",
        "capture KVCacheConfig.num_blocks",
        "capture CPUWorker",
    } <= told


def test_the_documented_table_has_the_oldest_and_the_newest_release() -> None:
    readme = (REPOSITORY / "profiler" / "vllm_check" / "README.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in readme.splitlines() if line.count("|") == 8]

    documented = [row for row in rows if row[:1].isdigit()]
    assert documented == sorted(documented, key=release_order, reverse=True)
    assert documented[0] == vllm_env.dotted(vllm_env.NEWEST_TESTED_VLLM)
    assert documented[-1] == vllm_env.dotted(vllm_env.OLDEST_VLLM)


class _Ranges(http.server.SimpleHTTPRequestHandler):
    """Serves parts of files where the server has `ranges`, whole files otherwise; notes what was asked."""

    def do_GET(self) -> None:
        assert isinstance(self.server, _Index)
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        body = Path(self.translate_path(self.path)).read_bytes()
        status, total = 200, len(body)
        if asked and self.server.ranges:
            first = int(asked[1]) if asked[1] else max(0, total - int(asked[2]))
            last = min(int(asked[2]), total - 1) if asked[1] and asked[2] else total - 1
            body, status = body[first : last + 1], 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.server.sent_bytes += len(body)
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


class _Index(http.server.ThreadingHTTPServer):
    ranges = True
    sent_bytes = 0


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Index]:
    """A server with one wheel, most of it ballast, and a pip that knows where it is."""
    ballast = {"vllm/ballast.so": "".join(map(str, range(1_000_000)))}
    wheel = write_wheel(tmp_path / "served", "vllm", "1.0.0", files={**_FILES, **ballast})
    with _Index(("127.0.0.1", 0), functools.partial(_Ranges, directory=str(tmp_path / "served"))) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}/{wheel.name}"

        def pip(*arguments: str) -> str:
            if arguments[0] == "install":
                return json.dumps({"install": [{"download_info": {"url": url}}]})
            if arguments[0] == "download":
                shutil.copy(wheel, arguments[arguments.index("--dest") + 1])
            return ""

        monkeypatch.setattr("profiler.vllm_check.releases._pip", pip)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_of_a_wheel_on_an_index_only_the_files_asked_for_travel(index: _Index, tmp_path: Path) -> None:
    told: list[str] = []

    with open_release("0.99.0", told.append) as vllm:
        assert _broken(findings_of(vllm, _ours(tmp_path, _OURS))) == []

    assert told == []
    assert index.sent_bytes < 2_000_000 < (tmp_path / "served" / "vllm-1.0.0-py3-none-any.whl").stat().st_size


def test_an_index_without_ranges_is_told_of_and_the_wheel_downloaded(index: _Index, tmp_path: Path) -> None:
    index.ranges = False
    told: list[str] = []

    with open_release("0.99.0", told.append) as vllm:
        assert _broken(findings_of(vllm, _ours(tmp_path, _OURS))) == []

    assert len(told) == 1
    assert "does not give parts of a file" in told[0]
