"""What a clone brings along."""

from __future__ import annotations

import subprocess

from environments import REPOSITORY

# The largest picture is two thirds of it.
MOST_BYTES = 512 << 10


def test_no_download_or_other_large_file_is_in_the_repository() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    files = [REPOSITORY / name for name in listed.stdout.split("\0") if name]
    assert files
    packed = [file.name for file in files if file.suffix in {".whl", ".gz", ".zip", ".so", ".pyc"}]
    assert packed == []
    assert [file.name for file in files if file.exists() and file.stat().st_size > MOST_BYTES] == []
    # A link that was made for one machine, and would take the place of what is there on another.
    assert [file.name for file in files if file.is_symlink()] == []
