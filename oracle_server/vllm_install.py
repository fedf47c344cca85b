"""`step-oracle vllm-install`: an environment that serves vLLM on a machine without a GPU. Standard library only.

The official wheel, unchanged, goes in with --no-deps beside a build of torch, its own requirements without the GPU
ones, and this package. Every stage looks first whether its work is done, so a run that was interrupted goes on where it
stopped. vLLM itself comes after everything it needs, and the file that says "complete" is the last one written: an
environment that is not whole never looks whole.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from oracle_server import vllm_env, vllm_requirements
from oracle_server.venv_python import InstallFailed, VenvPython, site_packages, told
from oracle_server.vllm_requirements import Verdict

# Raised when the stages below build a different environment from the same constants.
RECIPE_VERSION = 1
# vLLM 0.18.1 pins torch 2.10.0 and 0.33.0 pins 2.14.0; both serve emulated with this one, as no kernel of theirs is
# loaded.
TORCH_VERSION = "2.13.0"
PYTHON_VERSIONS = ((3, 11), (3, 13))
# 0.33.0 takes 2.7 GB and 0.18.1 2.9 GB with a CPU build of torch, and the wheel lies beside it while it is unpacked.
FREE_BYTES_NEEDED = 5 * 10**9
STATE_FOLDER = ".step-oracle"


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    version: str
    venv: Path
    python: str
    torch: str | None
    torch_index: str | None
    shim: bool


def main(argv: Sequence[str]) -> int:
    """Run the command; 0: complete (or verified), 1: not, 2: bad arguments, 130: interrupted."""
    parser = _parser()
    arguments = parser.parse_args(list(argv))
    numbers = vllm_env.release(arguments.version)
    if numbers is None or numbers < vllm_env.OLDEST_VLLM or not re.fullmatch(r"[\w.+]+", arguments.version):
        oldest = vllm_env.dotted(vllm_env.OLDEST_VLLM)
        parser.error(f"VERSION {arguments.version!r} is not a vLLM version from {oldest} on, for example 0.33.0")
    request = Request(
        version=arguments.version,
        venv=(arguments.venv or Path(f".venv-vllm-{arguments.version}")).absolute(),
        python=shutil.which(arguments.python or sys.executable) or arguments.python,
        torch=arguments.torch,
        torch_index=arguments.torch_index,
        shim=not arguments.without_shim,
    )
    try:
        if arguments.dry_run:
            _print_plan(request)
        elif arguments.verify:
            verify(request.venv, request.version)
        else:
            install(request)
    except InstallFailed as failure:
        print(f"error: {failure}\nnext:  {failure.next_step}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130
    return 0


def recipe_digest(version: str) -> str:
    """Names what `install` builds for this version without the shim: equal digests, interchangeable environments."""
    parts = [RECIPE_VERSION, TORCH_VERSION, *vllm_requirements.recipe(), version, list(sys.version_info[:2])]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def is_complete(venv: Path, version: str) -> bool:
    """Whether the environment was finished for this version of vLLM."""
    marker = _read_marker(venv)
    return marker is not None and marker.get("vllm") == version and marker.get("recipe") == RECIPE_VERSION


def install(request: Request) -> None:
    """Build the environment or complete it. Raises InstallFailed."""
    _check_machine(request)
    state = request.venv / STATE_FOLDER
    state.mkdir(parents=True, exist_ok=True)
    with (state / "install.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another vllm-install of the same environment", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        Installation(request, state).run()


def verify(venv: Path, version: str) -> None:
    """Check that vLLM is there and its files are the wheel's, byte for byte. Raises InstallFailed."""
    again = f"step-oracle vllm-install {version} --venv {venv}"
    python = venv / "bin" / "python"
    if not python.exists():
        raise InstallFailed(f"{venv} is not a virtual environment", f"build it: {again}")
    site = site_packages(python)
    installed = vllm_env.distribution_version([str(site)], "vllm")
    if installed != version:
        raise InstallFailed(f"{venv} holds vLLM {installed or '(none)'}, not {version}", f"build it: {again}")
    kept = venv / STATE_FOLDER / "vllm-RECORD"
    dist = vllm_env.distribution([str(site)], "vllm")
    record = kept.read_text(encoding="utf-8") if kept.exists() else (dist.read_text("RECORD") if dist else None)
    report = vllm_env.check_files(site, record or "", "vllm")
    if report.checked == 0:
        raise InstallFailed("vLLM's RECORD is missing, so its files cannot be compared", f"rebuild it: {again}")
    if not report.identical:
        lists = (("changed", report.changed), ("missing", report.missing), ("added", report.added))
        told = "; ".join(f"{len(names)} {what}, such as {names[0]}" for what, names in lists if names)
        next_step = f"remove it and build it anew: rm -r {venv} && {again}"
        raise InstallFailed(f"vLLM's files differ from its wheel: {told}", next_step)
    source = "the wheel's RECORD" if kept.exists() else "the installed RECORD"
    print(f"vLLM {version}: {report.checked} files are byte-identical to {source}, none added")


class Installation:
    """One run of the stages. Owned by `install`, which holds the environment's lock; one thread."""

    def __init__(self, request: Request, state: Path) -> None:
        self._request = request
        self._state = state
        self._python = VenvPython(request.venv, state / "install.log")
        self._begin = time.monotonic()
        self._again = "run the same command again; finished stages are kept"

    def run(self) -> None:
        request = self._request
        marker = _read_marker(request.venv) or {}
        stages: list[tuple[str, Callable[[], str]]] = [
            ("virtual environment", self._make_venv),
            (f"torch {request.torch or TORCH_VERSION}", self._install_torch),
            (f"requirements of vLLM {request.version}", self._install_requirements),
            (f"vLLM {request.version}", self._install_vllm),
        ]
        if request.shim:
            stages.append(("step-oracle", self._install_shim))
        stages.append(("check", self._check))
        print(f"vLLM {request.version} in {request.venv}", flush=True)
        (self._state / "complete.json").unlink(missing_ok=True)
        for number, (name, stage) in enumerate(stages, 1):
            begin = time.monotonic()
            print(f"[{number}/{len(stages)}] {name} ...", flush=True)
            outcome = stage()
            print(f"[{number}/{len(stages)}] {name}: {outcome} ({time.monotonic() - begin:.1f} s)", flush=True)
        shutil.rmtree(self._state / "download", ignore_errors=True)
        torch = vllm_env.build_of([str(site_packages(self._python.path))], "torch")
        self._write_marker(
            vllm=request.version, torch=torch.version if torch else "", shim=request.shim or bool(marker.get("shim"))
        )
        elapsed = time.monotonic() - self._begin
        print(f"complete in {elapsed:.0f} s, {_size_bytes(request.venv) / 1e9:.1f} GB")
        print(f"use it: {request.venv}/bin/vllm serve MODEL, with STEP_ORACLE_TARGET set; without, it is plain vLLM")

    def _make_venv(self) -> str:
        if self._python.has_pip():
            return "is there"
        strangers = [path.name for path in self._request.venv.iterdir() if path.name != STATE_FOLDER]
        if strangers and not (self._request.venv / "pyvenv.cfg").exists():
            message = f"{self._request.venv} is not empty and not a virtual environment (it holds {strangers[0]})"
            raise InstallFailed(message, "give an empty or new folder with --venv")
        hint = "install Python's venv module (Debian: python3-venv) or name another Python with --python"
        self._python.command([self._request.python, "-m", "venv", str(self._request.venv)], hint)
        self._python.pip(["install", "--upgrade", "pip"], self._again)
        return "made"

    def _install_torch(self) -> str:
        request, paths = self._request, [str(site_packages(self._python.path))]
        build = vllm_env.build_of(paths, "torch")
        wanted = request.torch or (build.version if build else TORCH_VERSION)
        whole = vllm_env.distribution_version(paths, "torch") is not None
        if build and whole and wanted in (build.version, build.version.partition("+")[0]):
            return f"{build.version} is there"
        index = ["--index-url", request.torch_index] if request.torch_index else []
        hint = "name another version with --torch, or an index that has a build for this Python with --torch-index"
        self._python.pip(["install", f"torch=={wanted}", *index], hint)
        build = vllm_env.build_of(paths, "torch")
        return f"{build.version if build else 'unknown'} installed"

    def _install_requirements(self) -> str:
        verdict = self._requirements()
        wanted, left_out = verdict.wanted, len(verdict.left_out)
        if not verdict.unmet:
            return f"{len(wanted)} are met, {left_out} for GPUs left out"
        paths = [str(site_packages(self._python.path))]
        torch = vllm_env.distribution_version(paths, "torch")
        listing, pins = self._state / "requirements.txt", self._state / "constraints.txt"
        listing.write_text("\n".join(wanted) + "\n", encoding="utf-8")
        # Without this pin, pip may answer a requirement of a requirement with another torch.
        pins.write_text(f"torch=={torch}\n", encoding="utf-8")
        self._python.pip(["install", "-r", str(listing), "-c", str(pins)], self._again)
        build = vllm_env.build_of(paths, "torch")
        removed = ""
        if build and build.cuda is None and vllm_env.distribution_version(paths, "triton") is not None:
            self._python.pip(["uninstall", "--yes", "triton"], self._again)
            removed = ", triton removed"
        return f"{len(wanted)} installed, {left_out} for GPUs left out{removed}"

    def _install_vllm(self) -> str:
        site = site_packages(self._python.path)
        version = vllm_env.distribution_version([str(site)], "vllm")
        kept = self._state / "vllm-RECORD"
        record = kept.read_text(encoding="utf-8") if kept.exists() else ""
        if record and version == self._request.version and vllm_env.check_files(site, record, "vllm").identical:
            return "is there"
        if version is not None and not kept.exists():
            if version == self._request.version:
                return "is there, installed by other means"
            message = f"{self._request.venv} holds vLLM {version}, which this command did not install"
            raise InstallFailed(message, "give another folder with --venv")
        wheel = self._wheel()
        # Installed whole or not at all as far as anyone can tell: the RECORD to compare with appears only afterwards.
        kept.unlink(missing_ok=True)
        self._python.pip(["install", "--no-deps", "--force-reinstall", "--no-warn-conflicts", str(wheel)], self._again)
        with zipfile.ZipFile(wheel) as archive:
            record = archive.read(_member(archive, "RECORD")).decode()
        _write_whole(kept, record)
        return "installed"

    def _install_shim(self) -> str:
        source, told = _own_source()
        hint = f"install it by hand: {self._python.path} -m pip install --no-deps step-oracle"
        self._python.pip(["install", "--no-deps", "--force-reinstall", "--no-warn-conflicts", *source], hint)
        return told

    def _check(self) -> str:
        request = self._request
        site = site_packages(self._python.path)
        paths = [str(site)]
        if request.shim and (unmet := self._unmet_of("step-oracle")):
            # vLLM's own requirements bring grpcio and protobuf; a version without them gets them, and no pin moves.
            frozen = self._state / "constraints.txt"
            pins = self._python.output(["-m", "pip", "freeze", "--exclude-editable"], self._again)
            frozen.write_text(pins, encoding="utf-8")
            self._python.pip(["install", "-c", str(frozen), *unmet], self._again)
        if mixed := vllm_env.mixed_builds(paths):
            fix = f"remove them: {self._python.path} -m pip uninstall {' '.join(vllm_env.TORCH_COMPANIONS)}"
            raise InstallFailed(f"builds of torch are mixed: {'; '.join(mixed)}", fix)
        if missing := self._requirements().unmet:
            raise InstallFailed(f"requirements are not met: {', '.join(missing)}", self._again)
        hint = f"see {self._state / 'install.log'}; a package that fails to import can be reinstalled with pip"
        # An out-of-tree platform is looked for at import, so none of ours may be asked to attach here.
        code = "import torch, vllm; print('imported', vllm.__version__, torch.__version__)"
        lines = self._python.output(["-c", code], hint).splitlines()
        imported = next((line.split() for line in reversed(lines) if line.startswith("imported ")), None)
        if imported is None or imported[1] != request.version:
            raise InstallFailed(f"vLLM {request.version} does not import: {lines[-1:]}", hint)
        if (self._state / "vllm-RECORD").exists():
            verify(request.venv, request.version)
        return f"vLLM {imported[1]} imports with torch {imported[2]}"

    def _wheel(self) -> Path:
        """The wheel, downloaded unless an earlier run left it whole."""
        folder = self._state / "download"
        folder.mkdir(exist_ok=True)
        for wheel in folder.glob("vllm-*.whl"):
            if wheel.name.split("-")[1] == self._request.version and zipfile.is_zipfile(wheel):
                return wheel
        hint = "see which versions have a wheel for this Python and platform: pip index versions vllm"
        options = ["--no-deps", "--only-binary=:all:", "-d", str(folder)]
        self._python.pip(["download", *options, f"vllm=={self._request.version}"], hint)
        return next(folder.glob("vllm-*.whl"))

    def _requirements(self) -> Verdict:
        site = site_packages(self._python.path)
        dist = vllm_env.distribution([str(site)], "vllm")
        if dist is not None and dist.metadata["Version"] == self._request.version:
            requirements = dist.requires or []
        else:
            with zipfile.ZipFile(self._wheel()) as archive:
                metadata = archive.read(_member(archive, "METADATA")).decode()
            requirements = re.findall(r"(?m)^Requires-Dist: (.*\S)", metadata)
        return self._judge(requirements)

    def _unmet_of(self, name: str) -> list[str]:
        dist = vllm_env.distribution([str(site_packages(self._python.path))], name)
        return list(self._judge(dist.requires or []).unmet) if dist else []

    def _judge(self, requirements: list[str]) -> Verdict:
        script = vllm_requirements.REQUIREMENTS_SCRIPT
        output = self._python.output(["-c", script], self._again, stdin=vllm_requirements.question(requirements))
        return vllm_requirements.verdict(output)

    def _write_marker(self, **facts: object) -> None:
        written = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        _write_whole(self._state / "complete.json", json.dumps({"recipe": RECIPE_VERSION, "written": written, **facts}))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="step-oracle vllm-install",
        description="Install vLLM so that it serves without a GPU: the official wheel, a torch, no CUDA packages.",
    )
    parser.add_argument("version", metavar="VERSION", help="vLLM version, for example 0.33.0 (0.18.1 or newer)")
    parser.add_argument("--venv", type=Path, metavar="DIR", help="environment to make or complete (.venv-vllm-VERSION)")
    parser.add_argument("--torch", metavar="VERSION", help=f"torch version ({TORCH_VERSION}, or the one that is there)")
    parser.add_argument(
        "--torch-index", metavar="URL", help="package index to take torch from, such as one of CPU builds"
    )
    parser.add_argument("--python", metavar="PY", help="Python that makes the environment (the one running this)")
    parser.add_argument("--without-shim", action="store_true", help="leave step-oracle itself out")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, change nothing")
    parser.add_argument("--verify", action="store_true", help="compare vLLM's files with its wheel, change nothing")
    return parser


def _print_plan(request: Request) -> None:
    python = request.venv / "bin" / "python"
    index = f" --index-url {request.torch_index}" if request.torch_index else ""
    print(f"would install vLLM {request.version} in {request.venv}:")
    print(f"  {request.python} -m venv {request.venv}")
    print(f"  {python} -m pip install torch=={request.torch or TORCH_VERSION}{index}")
    print(f"  {python} -m pip install (the requirements in the wheel's metadata, without those for GPUs)")
    print(f"  {python} -m pip install --no-deps vllm=={request.version}")
    if request.shim:
        print(f"  {python} -m pip install --no-deps {shlex.join(_own_source()[0])}")
    print("  check that it imports and that vLLM's files are the wheel's")


def _check_machine(request: Request) -> None:
    if not sys.platform.startswith("linux"):
        raise InstallFailed(f"vLLM has wheels for Linux only, this is {sys.platform}", "use Linux, a Linux VM or WSL2")
    code = "import sys; print(*sys.version_info[:2])"
    try:
        done = subprocess.run([request.python, "-c", code], capture_output=True, text=True, check=False)
    except OSError as error:
        raise InstallFailed(f"{request.python} does not run: {error}", "name a Python with --python") from error
    numbers = tuple(map(int, done.stdout.split())) if done.returncode == 0 else ()
    low, high = PYTHON_VERSIONS
    if not low <= numbers <= high:
        given = ".".join(map(str, numbers)) or f"nothing ({told(done.stderr)})"
        raise InstallFailed(
            f"Python must be {low[0]}.{low[1]} to {high[0]}.{high[1]}; {request.python} is {given}",
            "name another Python with --python",
        )
    parent = next(path for path in (request.venv, *request.venv.parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if free < FREE_BYTES_NEEDED and not (request.venv / "bin" / "vllm").exists():
        needed = f"an environment needs {FREE_BYTES_NEEDED / 1e9:.0f} GB while it is built"
        hint = "free some space, or give a folder on another disk with --venv"
        raise InstallFailed(f"{parent} has {free / 1e9:.1f} GB free; {needed}", hint)


def _own_source() -> tuple[list[str], str]:
    """pip's arguments that install this very package elsewhere, and a word on where it comes from."""
    try:
        dist = importlib.metadata.distribution("step-oracle")
    except importlib.metadata.PackageNotFoundError:
        dist = None
    origin = json.loads((dist.read_text("direct_url.json") if dist else None) or "{}")
    url = urlparse(origin.get("url", ""))
    local = Path(unquote(url.path)) if url.scheme == "file" else None
    if local is None and dist is None:
        local = Path(__file__).resolve().parent.parent
    if local is not None and local.exists():
        editable = ["--editable"] if origin.get("dir_info", {}).get("editable") else []
        return [*editable, str(local)], f"installed {'editable ' if editable else ''}from {local}"
    if vcs := origin.get("vcs_info"):
        return [f"step-oracle @ {vcs['vcs']}+{origin['url']}@{vcs['commit_id']}"], f"installed from {origin['url']}"
    version = dist.metadata["Version"] if dist else ""
    return [f"step-oracle=={version}"], f"{version} installed from the package index"


def _read_marker(venv: Path) -> dict[str, Any] | None:
    try:
        marker = json.loads((venv / STATE_FOLDER / "complete.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) else None


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_suffix(".new")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _member(archive: zipfile.ZipFile, name: str) -> str:
    return next(item for item in archive.namelist() if re.fullmatch(rf"[^/]+\.dist-info/{name}", item))


def _size_bytes(folder: Path) -> int:
    sizes = {}
    for file in folder.rglob("*"):
        status = file.lstat()
        sizes[status.st_ino] = status.st_size
    return sum(sizes.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
