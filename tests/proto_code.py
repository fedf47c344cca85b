"""The generated code in proto/: `python tests/proto_code.py write` makes it anew, `breaking` guards the wire contract.

It is made with the oldest supported grpcio-tools, in an environment of its own, so that it loads in any vLLM's.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from environments import REPOSITORY, cached_venv

# grpcio-tools 1.62.3 brings protoc 25.1: its code loads under protobuf 4.25 and every later one up to 7. It finds its
# own .proto files with pkg_resources, which setuptools 81 no longer has.
GENERATOR = ("grpcio-tools==1.62.3", "protobuf==4.25.9", "setuptools<81")
PROTO = REPOSITORY / "proto"


def generate(folder: Path) -> list[Path]:
    """Generate the code of every .proto file under `folder`, in the layout of proto/; returns the files, sorted."""
    python = cached_venv("proto", GENERATOR)
    sources = sorted(str(source.relative_to(PROTO)) for source in PROTO.rglob("*.proto"))
    outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run(
        [python, "-W", "ignore", "-m", "grpc_tools.protoc", "-I.", *outputs, *sources], cwd=PROTO, check=True
    )
    return sorted(path for path in folder.rglob("*_pb2*.py*") if "__pycache__" not in path.parts)


def compared_commit() -> tuple[str, str]:
    """The commit whose contract must still be served and "", or "" and why there is none."""
    head = _git("rev-parse", "HEAD")
    if not head:
        return "", "there is no commit yet"
    base = _git("merge-base", "origin/main", "HEAD")
    if not base or base == head:
        base = _git("rev-parse", "HEAD~1")
    if not base:
        return "", "there is no commit before this one"
    if not _git("ls-tree", "--name-only", base, "--", "proto/step_oracle"):
        return "", f"commit {base[:12]} has no proto/step_oracle"
    return base, ""


def breaking() -> int:
    """Compare the contract with that of `compared_commit`; prints what would break a client of it."""
    base, reason = compared_commit()
    if not base:
        print(f"buf breaking: skipped, {reason}")
        return 0
    archive = subprocess.run(["git", "archive", base, "proto"], cwd=REPOSITORY, capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        buf = Path(sys.executable).with_name("buf")
        status = subprocess.run([buf, "breaking", "proto", "--against", f"{folder}/proto"], cwd=REPOSITORY).returncode
    print(f"buf breaking: against {base[:12]}, {'nothing breaks' if status == 0 else 'see above'}")
    return status


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("write", "breaking"))
    if parser.parse_args().action == "breaking":
        sys.exit(breaking())
    print(f"{len(generate(PROTO))} files are fresh")
