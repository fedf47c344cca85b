"""manifest.json: its canonical form, its digest, what newer versions may add."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import build_constant_pack, build_manifest, build_sampled_pack, operator_specs
from oracle_server.errors import PackInvalid
from oracle_server.pack import (
    ComposedLatency,
    Latency,
    Manifest,
    SampledLatency,
    Uncertainty,
    canonical_manifest,
    check_pack,
    digest_of,
    manifest_bytes,
    parse_manifest,
)


def some_manifest() -> Manifest:
    return build_manifest(
        Latency(composed=ComposedLatency(operators=operator_specs(["dense_gemm", "logits"]))),
        uncertainty=Uncertainty(low_percent=-5, high_percent=10.5, basis="held-out steps"),
        provenance={"tool": "a test", "zürich": "Ω"},
        coverage={"steps": 12, "share": 0.25, "note": "few", "graphs": True},
    )


def test_a_manifest_survives_writing_and_parsing() -> None:
    manifest = some_manifest()
    assert parse_manifest(manifest_bytes(manifest)) == manifest
    assert manifest_bytes(parse_manifest(manifest_bytes(manifest))) == manifest_bytes(manifest)


def test_canonical_bytes_are_sorted_and_without_white_space() -> None:
    data = b'{ "b" : [1, 2.50, 1e2], "a": {"d": null, "c": "\\u03a9"} }\n'
    assert canonical_manifest(data) == '{"a":{"c":"Ω","d":null},"b":[1,2.5,100]}'.encode()


def test_the_digest_does_not_depend_on_layout() -> None:
    data = manifest_bytes(some_manifest())
    pretty = json.dumps(dict(reversed(json.loads(data).items())), indent=4).encode()
    assert digest_of(pretty) == digest_of(data)
    assert digest_of(data).startswith("sha256:")
    assert len(digest_of(data)) == 7 + 64
    assert digest_of(data.replace(b"held-out", b"holdout")) != digest_of(data)


def test_options_of_neighbors_that_are_not_given_do_not_change_a_packs_digest() -> None:
    plain = build_manifest(Latency(sampled=SampledLatency()))
    options = json.loads(manifest_bytes(plain))["latency"]["sampled"]
    assert set(options) == {
        "tokens_bucket_width",
        "concurrency_bucket_width",
        "min_samples",
        "max_buckets",
        "table_rule",
    }
    ranked = build_manifest(Latency(sampled=SampledLatency(neighbors="hierarchical", context_bucket_width=4096)))
    assert parse_manifest(manifest_bytes(ranked)) == ranked
    assert digest_of(manifest_bytes(ranked)) != digest_of(manifest_bytes(plain))


def test_a_newer_minor_version_is_read_and_its_fields_count_in_the_digest(tmp_path: Path) -> None:
    build_sampled_pack(tmp_path / "pack")
    before = check_pack(tmp_path / "pack")
    path = tmp_path / "pack" / "manifest.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "schema": "step_oracle.pack/1.7", "novelty": [1, 2]}))
    report = check_pack(tmp_path / "pack")
    assert report.warnings == ("manifest.json: unknown field 'novelty' is kept and ignored",)
    assert report.digest != before.digest
    assert report.manifest.files == before.manifest.files


def test_a_file_the_manifest_does_not_name_is_told(tmp_path: Path) -> None:
    build_sampled_pack(tmp_path / "pack")
    (tmp_path / "pack" / "notes.txt").write_text("hello")
    assert check_pack(tmp_path / "pack").warnings == ("notes.txt is not named by the manifest and is ignored",)


def test_the_digest_names_all_numbers_of_a_pack(tmp_path: Path) -> None:
    first = build_constant_pack(tmp_path / "a", latency_ns=10_000_000)
    again = build_constant_pack(tmp_path / "b", latency_ns=10_000_000)
    other = build_constant_pack(tmp_path / "c", latency_ns=10_000_001)
    more_blocks = build_constant_pack(tmp_path / "d", latency_ns=10_000_000, kv_blocks=10_001)
    assert first == again
    assert len({first, other, more_blocks}) == 3


def test_constructors_check_nothing_but_reading_does() -> None:
    manifest = msgspec.structs.replace(some_manifest(), name="")
    with pytest.raises(PackInvalid) as refusal:
        parse_manifest(manifest_bytes(manifest))
    assert refusal.value.where == "manifest.json: name"


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_parsed(data: bytes) -> None:
    with pytest.raises(PackInvalid):
        parse_manifest(data)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
        max_leaves=20,
    )
)
def test_the_canonical_form_is_a_fixed_point(value: object) -> None:
    try:
        canonical = canonical_manifest(json.dumps({"value": value}).encode())
    except PackInvalid:
        return
    assert canonical_manifest(canonical) == canonical
    assert json.loads(canonical) == {"value": value}


def test_a_manifest_at_the_limits_is_checked_quickly() -> None:
    # One mebibyte of one key: a check that compares every key with every other would take hours.
    data = ('{"provenance":{' + ",".join(f'"{i}":""' for i in range(90_000)) + "}}").encode()
    assert len(data) < 1 << 20
    before = os.times().user
    with pytest.raises(PackInvalid, match="schema"):
        parse_manifest(data)
    assert os.times().user - before < 5


def test_the_first_manifest_of_a_process_may_be_read_by_several_threads() -> None:
    """msgspec has worked out the manifest's types at the import: it does that in Python, and not for two at once."""
    program = """
import sys
from oracle_server.pack import parse_manifest
data, files = sys.stdin.buffer.read(), []
sys.setprofile(lambda frame, event, _: files.append(frame.f_code.co_filename) if event == "call" else None)
parse_manifest(data)
sys.setprofile(None)
assert any("manifest.py" in file for file in files)
assert not [file for file in files if "msgspec" in file], files
"""
    done = subprocess.run([sys.executable, "-c", program], input=manifest_bytes(some_manifest()), capture_output=True)

    assert done.returncode == 0, done.stderr.decode()
