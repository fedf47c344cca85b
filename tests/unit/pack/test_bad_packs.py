"""Every malformed pack of the corpus is refused by the checker, naming the place; what is refused is not compiled."""

from __future__ import annotations

from pathlib import Path

import pytest

from bad_packs import BAD_PACKS
from builders import build_composed_pack, build_hybrid_pack, build_sampled_pack
from oracle_server.errors import PackDigestMismatch, PackInvalid
from oracle_server.pack import Limits, check_pack, compile_pack
from pack_faults import parquet_bomb_that_declares_few_rows

DIGEST_FAULTS = {
    "declared_size_wrong",
    "flipped_bit",
    "truncated_parquet_unsigned",
    "wrong_digest",
}


def build(directory: Path, kind: str) -> None:
    if kind == "sampled":
        build_sampled_pack(directory)
    elif kind == "hybrid":
        build_hybrid_pack(directory, ratios=(0.9, 1.0, 1.1))
    else:
        build_composed_pack(directory, ratios=(0.9, 1.0, 1.1))


@pytest.mark.parametrize("kind", ["sampled", "composed", "hybrid"])
def test_the_packs_the_corpus_spoils_are_valid(tmp_path: Path, kind: str) -> None:
    build(tmp_path / "pack", kind)
    assert check_pack(tmp_path / "pack").warnings == ()


@pytest.mark.parametrize("fault", BAD_PACKS)
def test_a_malformed_pack_is_refused_naming_the_place(tmp_path: Path, fault: str) -> None:
    kind, spoil, where, message = BAD_PACKS[fault]
    build(tmp_path / "pack", kind)
    spoil(tmp_path / "pack")
    with pytest.raises(PackInvalid) as refusal:
        check_pack(tmp_path / "pack")
    assert where in refusal.value.where
    assert message in refusal.value.message
    assert isinstance(refusal.value, PackDigestMismatch) == (fault in DIGEST_FAULTS)


def test_a_refused_pack_leaves_nothing_behind(tmp_path: Path) -> None:
    build(tmp_path / "pack", "sampled")
    BAD_PACKS["latency_zero"][1](tmp_path / "pack")
    with pytest.raises(PackInvalid):
        compile_pack(tmp_path / "pack", tmp_path / "compiled" / "pack")
    assert list((tmp_path / "compiled").iterdir()) == []


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    # Decoded it needs 1,160 MB; the libraries alone map about 350 MB.
    build(tmp_path / "pack", "sampled")
    parquet_bomb_that_declares_few_rows(tmp_path / "pack")
    with pytest.raises(PackInvalid, match="40000000 rows"):
        check_pack(tmp_path / "pack", Limits(memory_bytes=512 << 20))


def test_a_directory_that_is_absent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackInvalid, match="not a directory"):
        check_pack(tmp_path / "absent")
