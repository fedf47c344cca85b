"""Names of places in registries, read as they are meant or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from oracle_server.config import PackRegistryConfig, read_config
from oracle_server.errors import InvalidArgument
from oracle_server.registry_reference import RegistryReference, parse_reference, parse_repository

IMAGE = "sha256:" + 64 * "a"


@pytest.mark.parametrize(
    ("text", "tls", "authority", "plaintext"),
    [
        ("registry.example.org/oracle/packs", False, "registry.example.org:443", False),
        ("registry/packs", False, "registry:443", False),
        ("registry.example.org:5000/packs", False, "registry.example.org:5000", False),
        ("localhost/packs", False, "localhost:80", True),
        ("localhost/packs", True, "localhost:443", False),
        ("127.0.0.1:5000/a/b__c/d-e.f", False, "127.0.0.1:5000", True),
        ("[::1]:5000/packs", False, "[::1]:5000", True),
        ("[2001:db8::1]/packs", False, "[2001:db8::1]:443", False),
    ],
)
def test_loopback_alone_is_plaintext_and_a_port_is_always_known(
    text: str, tls: bool, authority: str, plaintext: bool
) -> None:
    reference = parse_repository(text, tls=tls)
    assert (reference.authority, reference.plaintext) == (authority, plaintext)
    assert reference.place == f"{authority}/{reference.repository}"


def test_an_artifact_has_a_tag_or_the_digest_of_its_image() -> None:
    tagged = parse_reference("r.org/p:sha256-00", tls=False)
    assert (tagged.repository, tagged.tag, tagged.digest) == ("p", "sha256-00", "")
    pinned = parse_reference(f"r.org/p@{IMAGE}", tls=False)
    assert (pinned.repository, pinned.tag, pinned.digest) == ("p", "", IMAGE)
    for text in ("r.org:5000/p:tag", f"r.org:5000/p@{IMAGE}"):
        with pytest.raises(InvalidArgument, match=r"give the repository alone: r\.org:5000/p$"):
            parse_repository(text, tls=False)


@pytest.mark.parametrize(
    "text",
    [
        "", "packs", "/packs", "https://r.org/p", "oci://r.org/p", "user:word@r.org/p", "r.org/", "r.org/P",
        "r.org/a//b",
        "r.org/../p", "r.org/p/..", "r.org/.p", "r.org/p?x", "r.org/p#x", "r.org /p", "r.org/p\n", "r.org:0/p",
        "r.org:70000/p", "r.org:x/p", "r.org/p@sha256:00", "r.org/p:", f"r.org/p:t@{IMAGE}", "r.org/" + 256 * "a",
        "-r.org/p", "[::1/p",
    ],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="names no place in a registry"):
        parse_reference(text, tls=False)


def test_the_server_takes_them_from_flags_and_variables() -> None:
    place = RegistryReference("r.org", 443, "p", False)
    variables = {"STEP_ORACLE_PACK_REGISTRY": "r.org/p", "STEP_ORACLE_PACK_REGISTRY_CREDENTIALS": "/c"}
    assert read_config({}).pack_registry is None
    assert read_config(variables).pack_registry == PackRegistryConfig(place, Path("/c"))
    given = read_config(variables, pack_registry="localhost/q", pack_registry_ca=Path("/ca")).pack_registry
    assert given == PackRegistryConfig(RegistryReference("localhost", 443, "q", False), Path("/c"), Path("/ca"))
    for environment in (
        {"STEP_ORACLE_PACK_REGISTRY": "r.org/p:tag"},
        {"STEP_ORACLE_PACK_REGISTRY_CREDENTIALS": "/c"},
        {"STEP_ORACLE_PACK_REGISTRY_CA": "/c"},
        {"STEP_ORACLE_PACK_REGISTRY_PASSWORD": "p"},
    ):
        with pytest.raises(InvalidArgument):
            read_config(environment)
