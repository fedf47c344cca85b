"""Packs in a real registry: whole, under their digests, and never believed without a look."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from builders import build_composed_pack, build_constant_pack
from oracle_server import pack as packs
from oracle_server.errors import OracleError, PackDigestMismatch, PackInvalid, PackRegistryUnavailable, StoreFailed
from oracle_server.state import registry_transport
from oracle_server.state.pack_artifact import PACK_FILE, PACK_MANIFEST, tag_of
from oracle_server.state.pack_registry import PackRegistry
from registry_server import PASSWORD, USER, LyingRegistry, RegistryProcess, Reply, refusal

REPOSITORY = "oracle/packs"
ELSEWHERE = "sha256:" + 64 * "0"
Lie = Callable[[str, str, Reply], Reply]


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A pack of two files beside its manifest: (digest, folder)."""
    folder = tmp_path_factory.mktemp("pack") / "pack"
    return build_composed_pack(folder, ratios=[0.9, 1.0, 1.1]), folder


@pytest.fixture
def repository(registry_process: RegistryProcess, request: pytest.FixtureRequest) -> str:
    """A repository of the test's own."""
    return f"tests/{hashlib.sha256(request.node.name.encode()).hexdigest()[:16]}"


@pytest.fixture
def opened() -> Iterator[Callable[..., PackRegistry]]:
    """Opens repositories; they are closed with the test."""
    open_now: list[PackRegistry] = []

    def start(authority: str, repository: str, **options: object) -> PackRegistry:
        registry = PackRegistry(authority, repository, **{"plaintext": True, **options})  # type: ignore[arg-type]
        open_now.append(registry)
        return registry

    yield start
    for registry in open_now:
        registry.close()


@pytest.fixture
def remote(registry_process: RegistryProcess, repository: str, opened: Callable[..., PackRegistry]) -> PackRegistry:
    """The test's repository."""
    return opened(registry_process.authority, repository)


def empty(path: Path) -> Path:
    path.mkdir()
    return path


def rewrite(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


async def test_what_was_pushed_is_fetched_byte_for_byte(
    remote: PackRegistry, pack: tuple[str, Path], tmp_path: Path
) -> None:
    digest, folder = pack
    await remote.push(digest, folder)
    await remote.push(digest, folder)
    await remote.fetch(digest, empty(tmp_path / "got"))
    assert contents(tmp_path / "got") == contents(folder)
    assert packs.check_pack(tmp_path / "got").digest == digest


async def test_an_artifact_is_laid_out_as_documented(
    remote: PackRegistry, registry_process: RegistryProcess, repository: str, pack: tuple[str, Path]
) -> None:
    digest, folder = pack
    pushed = await remote.push_as(folder, "latest")
    image = json.loads(registry_process.blob(pushed.image_digest).read_text())
    named = {layer["annotations"]["org.opencontainers.image.title"]: layer for layer in image["layers"]}
    assert registry_process.tags(repository) == ["latest", tag_of(digest)]
    assert image["annotations"]["step-oracle.pack.digest"] == digest
    assert set(named) == {path.name for path in folder.iterdir()}
    for name, layer in named.items():
        assert layer["mediaType"] == (PACK_MANIFEST if name == "manifest.json" else PACK_FILE)
        assert registry_process.blob(layer["digest"]).read_bytes() == (folder / name).read_bytes()


async def test_a_tag_and_the_digest_of_the_image_name_the_same_pack(
    remote: PackRegistry, pack: tuple[str, Path], tmp_path: Path
) -> None:
    _, folder = pack
    pushed = await remote.push_as(folder, "latest")
    for i, reference in enumerate(("latest", pushed.image_digest)):
        assert await remote.fetch_as(reference, empty(tmp_path / str(i))) == pushed
        assert contents(tmp_path / str(i)) == contents(folder)


async def test_a_folder_of_another_pack_is_refused(remote: PackRegistry, pack: tuple[str, Path]) -> None:
    with pytest.raises(PackDigestMismatch, match=pack[0]):
        await remote.push(ELSEWHERE, pack[1])


async def test_a_folder_that_is_not_what_its_manifest_says_leaves_no_tag(
    remote: PackRegistry, registry_process: RegistryProcess, repository: str, tmp_path: Path
) -> None:
    digest = build_constant_pack(tmp_path / "pack")
    file = tmp_path / "pack" / "operators.parquet"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreFailed, match="DIGEST_INVALID"):
        await remote.push(digest, tmp_path / "pack")
    assert registry_process.tags(repository) == []


async def test_a_deleted_pack_is_not_there_and_comes_back(
    remote: PackRegistry, registry_process: RegistryProcess, repository: str, pack: tuple[str, Path], tmp_path: Path
) -> None:
    digest, folder = pack
    await remote.delete(digest)
    await remote.push(digest, folder)
    await remote.delete(digest)
    assert registry_process.tags(repository) == []
    with pytest.raises(StoreFailed, match="is not there; push the pack"):
        await remote.fetch(digest, empty(tmp_path / "none"))
    await remote.push(digest, folder)
    await remote.fetch(digest, empty(tmp_path / "got"))
    assert contents(tmp_path / "got") == contents(folder)


async def test_another_pack_under_the_tag_is_told(remote: PackRegistry, pack: tuple[str, Path], tmp_path: Path) -> None:
    other = build_constant_pack(tmp_path / "other", latency_ns=77)
    await remote.push_as(pack[1], tag_of(other))
    with pytest.raises(StoreFailed, match=f"holds the pack {pack[0]}, not {other}"):
        await remote.fetch(other, empty(tmp_path / "got"))


async def test_damage_in_its_storage_is_found(
    remote: PackRegistry, registry_process: RegistryProcess, tmp_path: Path
) -> None:
    digest = build_constant_pack(tmp_path / "pack", latency_ns=123_456)
    await remote.push(digest, tmp_path / "pack")
    entry = packs.parse_manifest((tmp_path / "pack" / "manifest.json").read_bytes()).files[0]
    blob = registry_process.blob(f"sha256:{entry.sha256}")
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)
    with pytest.raises(StoreFailed, match=f"sha256:{entry.sha256} .* is damaged"):
        await remote.fetch(digest, empty(tmp_path / "got"))


def changed(method: str, path: str, reply: Reply) -> Reply:
    """Blobs with one bit changed."""
    if "/blobs/sha256:" not in path or method != "GET":
        return reply
    return reply.saying(reply.body[:-1] + bytes([reply.body[-1] ^ 1]))


def shorter(method: str, path: str, reply: Reply) -> Reply:
    """Blobs that end early, as announced."""
    return reply.saying(reply.body[:-1]) if "/blobs/sha256:" in path else reply


def cut_off(method: str, path: str, reply: Reply) -> Reply:
    """Blobs that end before their announced length."""
    return reply.saying(reply.body[:-1], len(reply.body)) if "/blobs/sha256:" in path else reply


def longer(method: str, path: str, reply: Reply) -> Reply:
    """Blobs that go on, with no length announced."""
    return reply.saying(reply.body + b"x", None) if "/blobs/sha256:" in path else reply


def endless(method: str, path: str, reply: Reply) -> Reply:
    """A gigabyte announced for each blob."""
    return reply.saying(reply.body, 1 << 30) if "/blobs/sha256:" in path else reply


def large_image(method: str, path: str, reply: Reply) -> Reply:
    """An image manifest of a megabyte."""
    return reply.saying(b" " * (1 << 20) + reply.body) if "/manifests/" in path else reply


def encoded(method: str, path: str, reply: Reply) -> Reply:
    """Blobs said to be compressed: what would be read has no bound."""
    if "/blobs/sha256:" not in path:
        return reply
    return Reply(reply.status, (*reply.headers, ("Content-Encoding", "gzip")), reply.body, reply.length)


def no_json(method: str, path: str, reply: Reply) -> Reply:
    """An image manifest that is no JSON."""
    return reply.saying(b"[" * 100_000) if "/manifests/" in path else reply


def no_layers(method: str, path: str, reply: Reply) -> Reply:
    """An image manifest of something else."""
    return reply.saying(b'{"layers": [1, {"mediaType": 2}], "config": []}') if "/manifests/" in path else reply


def far_away(method: str, path: str, reply: Reply) -> Reply:
    """Blobs behind a redirect to plaintext elsewhere."""
    return refusal(307, Location="http://203.0.113.1/blob") if "/blobs/sha256:" in path else reply


def nowhere(method: str, path: str, reply: Reply) -> Reply:
    """Blobs behind a redirect to what is no URL."""
    return refusal(307, Location="https://[::1/blob") if "/blobs/sha256:" in path else reply


def round_and_round(method: str, path: str, reply: Reply) -> Reply:
    """Blobs behind a redirect to themselves."""
    return refusal(307, Location=path) if "/blobs/sha256:" in path else reply


@pytest.mark.parametrize(
    ("lie", "error", "words"),
    [
        (changed, StoreFailed, "is damaged"),
        (shorter, StoreFailed, "announces"),
        (cut_off, PackRegistryUnavailable, "broke off"),
        (longer, StoreFailed, "sends more than"),
        (endless, StoreFailed, "announces"),
        (large_image, PackRegistryUnavailable, "more than"),
        (encoded, StoreFailed, "encoded"),
        (no_json, StoreFailed, "not JSON"),
        (no_layers, StoreFailed, "is no pack"),
        (far_away, StoreFailed, "only https is followed"),
        (nowhere, PackRegistryUnavailable, "Invalid IPv6 URL"),
        (round_and_round, StoreFailed, "redirects more than"),
        (lambda *_: refusal(429), PackRegistryUnavailable, "answers 429"),
        (lambda *_: refusal(500), PackRegistryUnavailable, "answers 500 .*as the test says"),
        (lambda *_: refusal(503), PackRegistryUnavailable, "answers 503"),
        (lambda *_: refusal(401), PackRegistryUnavailable, "none"),
        (lambda *_: refusal(401, WWW_Authenticate='Basic realm="x"'), PackRegistryUnavailable, "refuses the cred"),
        (lambda *_: refusal(403), PackRegistryUnavailable, "refuses the credentials"),
        (
            lambda *_: refusal(401, WWW_Authenticate='Bearer realm="http://[::1/token"'),
            PackRegistryUnavailable,
            "only one by https",
        ),
        (
            lambda *_: refusal(401, WWW_Authenticate='Bearer realm="http://203.0.113.1/token",service="x"'),
            PackRegistryUnavailable,
            "only one by https",
        ),
    ],
)  # fmt: skip
async def test_a_registry_that_lies_or_refuses_is_told_from_one_that_does_not(
    registry_process: RegistryProcess,
    remote: PackRegistry,
    repository: str,
    opened: Callable[..., PackRegistry],
    pack: tuple[str, Path],
    tmp_path: Path,
    lie: Lie,
    error: type[OracleError],
    words: str,
) -> None:
    digest, folder = pack
    await remote.push(digest, folder)
    with LyingRegistry(registry_process.port, lie) as liar, pytest.raises(error, match=words):
        await opened(liar.authority, repository).fetch(digest, empty(tmp_path / "got"))
    # Nothing but the pack's own names, and none of them whole and wrong.
    for name, data in contents(tmp_path / "got").items():
        assert (folder / name).read_bytes().startswith(data) or lie is changed


@pytest.mark.parametrize("status", [401, 429, 500, 413])
async def test_a_push_that_is_refused_leaves_no_tag(
    registry_process: RegistryProcess,
    repository: str,
    opened: Callable[..., PackRegistry],
    pack: tuple[str, Path],
    status: int,
) -> None:
    def refuse(method: str, path: str, reply: Reply) -> Reply:
        return refusal(status) if method == "PUT" else reply

    with (
        LyingRegistry(registry_process.port, refuse) as liar,
        pytest.raises(StoreFailed if status == 413 else PackRegistryUnavailable),
    ):
        await opened(liar.authority, repository).push(*pack)
    assert registry_process.tags(repository) == []


async def test_an_upload_is_sent_nowhere_else(
    registry_process: RegistryProcess, repository: str, opened: Callable[..., PackRegistry], pack: tuple[str, Path]
) -> None:
    def elsewhere(method: str, path: str, reply: Reply) -> Reply:
        return refusal(202, Location="http://127.0.0.1:9/v2/upload") if method == "POST" else reply

    with (
        LyingRegistry(registry_process.port, elsewhere) as liar,
        pytest.raises(StoreFailed, match=r"points to http://127.0.0.1:9/v2/upload"),
    ):
        await opened(liar.authority, repository).push(*pack)


async def test_a_blob_may_lie_behind_a_redirect_which_gets_no_credentials(
    tmp_path: Path, opened: Callable[..., PackRegistry], pack: tuple[str, Path]
) -> None:
    digest, folder = pack
    (tmp_path / "credentials").write_text(f"{USER}:{PASSWORD}\n")
    options = {"credentials": tmp_path / "credentials"}
    with RegistryProcess(tmp_path / "registry", with_credentials=True) as process:
        await opened(process.authority, REPOSITORY, **options).push(digest, folder)

        def redirected(method: str, path: str, reply: Reply) -> Reply:
            if "/blobs/sha256:" in path and "storage" not in path and reply.status == 200:
                return refusal(307, Location=f"{path}?storage")
            return reply if reply.status != 401 or "?storage" not in path else replies[path.partition("?")[0]]

        replies: dict[str, Reply] = {}

        def remembered(method: str, path: str, reply: Reply) -> Reply:
            if reply.status == 200:
                replies[path] = reply
            return redirected(method, path, reply)

        with LyingRegistry(process.port, remembered) as liar:
            await opened(liar.authority, REPOSITORY, **options).fetch(digest, empty(tmp_path / "got"))
    assert contents(tmp_path / "got") == contents(folder)
    assert {sent for _, path, sent in liar.asked if "?storage" in path} == {""}
    assert any(sent.startswith("Basic ") for _, _, sent in liar.asked)


async def test_credentials_are_read_at_each_use_and_asked_for(
    tmp_path: Path, opened: Callable[..., PackRegistry], pack: tuple[str, Path]
) -> None:
    file = tmp_path / "credentials"
    with RegistryProcess(tmp_path / "registry", with_credentials=True) as process:
        with pytest.raises(PackRegistryUnavailable, match="give a file of credentials") as caught:
            await opened(process.authority, REPOSITORY).push(*pack)
        assert caught.value.answered
        remote = opened(process.authority, REPOSITORY, credentials=file)
        for content, words in (
            (None, "cannot be read"),
            ("no colon", "not one line USER:PASSWORD"),
            (f"{USER}:wrong", f"refuses the credentials.*{re.escape(str(file))}"),
        ):
            if content is not None:
                file.write_text(content)
            with pytest.raises(PackRegistryUnavailable, match=words):
                await remote.push(*pack)
        file.write_text(f"{USER}:{PASSWORD}\n")
        await remote.push(*pack)
        await remote.fetch(pack[0], empty(tmp_path / "got"))
        await remote.delete(pack[0])


async def test_a_token_is_asked_for_with_the_scope_of_each_challenge(
    registry_process: RegistryProcess,
    repository: str,
    tmp_path: Path,
    opened: Callable[..., PackRegistry],
    pack: tuple[str, Path],
) -> None:
    (tmp_path / "credentials").write_text(f"{USER}:{PASSWORD}")
    liar = LyingRegistry(registry_process.port)

    def with_tokens(method: str, path: str, reply: Reply) -> Reply:
        sent = liar.asked[-1][2]
        if path.startswith("/token"):
            scope = "push" if "push" in path else "pull"
            return refusal(200).saying(json.dumps({"token": scope}).encode())
        needed = "pull" if method in ("GET", "HEAD") else "push"
        if sent in (f"Bearer {needed}", "Bearer push"):
            return reply
        realm = f'Bearer realm="http://{liar.authority}/token",service="r",scope="repository:x:{needed}"'
        return refusal(401, WWW_Authenticate=realm)

    liar.lie = with_tokens
    with liar:
        remote = opened(liar.authority, repository, credentials=tmp_path / "credentials")
        await remote.push(*pack)
        await remote.fetch(pack[0], empty(tmp_path / "got"))
    asked_for_tokens = [sent for _, path, sent in liar.asked if path.startswith("/token")]
    assert contents(tmp_path / "got") == contents(pack[1])
    assert len(asked_for_tokens) == 3
    assert all(sent.startswith("Basic ") for sent in asked_for_tokens)


@pytest.mark.parametrize("answer", [b"[]", b"no json", b"{}", b'{"token": ""}'])
async def test_a_token_service_that_gives_no_token_is_told(
    registry_process: RegistryProcess,
    repository: str,
    tmp_path: Path,
    opened: Callable[..., PackRegistry],
    answer: bytes,
) -> None:
    liar = LyingRegistry(registry_process.port)

    def without(method: str, path: str, reply: Reply) -> Reply:
        if path.startswith("/token"):
            return refusal(200).saying(answer)
        return refusal(401, WWW_Authenticate=f'Bearer realm="http://{liar.authority}/token",service="r"')

    liar.lie = without
    with liar, pytest.raises(PackRegistryUnavailable):
        await opened(liar.authority, repository).fetch(ELSEWHERE, empty(tmp_path / "got"))


async def test_tls_needs_a_certificate_of_the_ca_that_is_given(
    tmp_path: Path, opened: Callable[..., PackRegistry], pack: tuple[str, Path]
) -> None:
    ca, stranger = trustme.CA(), trustme.CA()
    certificate = ca.issue_cert("127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    stranger.cert_pem.write_to_path(str(tmp_path / "stranger.pem"))
    (tmp_path / "no.pem").write_text("no PEM")
    with RegistryProcess(tmp_path / "registry", tls=(tmp_path / "cert.pem", tmp_path / "key.pem")) as process:
        secured = {"plaintext": False}
        for ca_file, words in (("stranger.pem", "CERTIFICATE_VERIFY_FAILED"), ("no.pem", "give a PEM file")):
            with pytest.raises(PackRegistryUnavailable, match=words):
                await opened(process.authority, REPOSITORY, ca=tmp_path / ca_file, **secured).push(*pack)
        with pytest.raises(PackRegistryUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
            await opened(process.authority, REPOSITORY, **secured).push(*pack)
        remote = opened(process.authority, REPOSITORY, ca=tmp_path / "ca.pem", **secured)
        await remote.push(*pack)
        await remote.fetch(pack[0], empty(tmp_path / "got"))
    assert contents(tmp_path / "got") == contents(pack[1])


async def test_variables_and_files_of_the_user_have_no_say(
    remote: PackRegistry, pack: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".docker").mkdir()
    (tmp_path / ".docker" / "config.json").write_text('{"credsStore": "would-be-run"}')
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    await remote.push(*pack)
    await remote.fetch(pack[0], empty(tmp_path / "got"))
    assert contents(tmp_path / "got") == contents(pack[1])


async def test_a_registry_that_is_gone_or_hangs_is_told_in_time(
    tmp_path: Path, opened: Callable[..., PackRegistry], pack: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_transport, "READ_SECONDS", 0.3)
    with RegistryProcess(tmp_path / "registry") as process:
        remote = opened(process.authority, REPOSITORY)
        process.pause()
        with pytest.raises(PackRegistryUnavailable, match=r"cannot be asked .*timed out"):
            await remote.push(*pack)
        process.go_on()
        await remote.push(*pack)
        process.stop()
        with pytest.raises(PackRegistryUnavailable, match=r"cannot be asked .*refused"):
            await remote.fetch(pack[0], empty(tmp_path / "none"))
        process.start()
        await remote.fetch(pack[0], empty(tmp_path / "got"))


async def test_one_that_drips_is_given_up_when_the_time_is_over(
    remote: PackRegistry,
    registry_process: RegistryProcess,
    repository: str,
    opened: Callable[..., PackRegistry],
    pack: tuple[str, Path],
    tmp_path: Path,
) -> None:
    await remote.push(*pack)
    clock = iter(range(0, 10_000, 100))
    slow = opened(registry_process.authority, repository, monotonic=lambda: float(next(clock)))
    with pytest.raises(PackRegistryUnavailable, match="did not get to an end within 300 s"):
        await slow.fetch(pack[0], empty(tmp_path / "got"))


async def test_after_close_nothing_is_asked(remote: PackRegistry, pack: tuple[str, Path]) -> None:
    remote.close()
    with pytest.raises(PackRegistryUnavailable, match="stopping"):
        await remote.push(*pack)


async def test_nothing_is_written_through_a_link_or_over_a_file(
    remote: PackRegistry, pack: tuple[str, Path], tmp_path: Path
) -> None:
    await remote.push(*pack)
    outside = tmp_path / "outside"
    outside.write_text("mine")
    folder = empty(tmp_path / "got")
    (folder / "manifest.json").symlink_to(outside)
    with pytest.raises(StoreFailed, match="the disk refused"):
        await remote.fetch(pack[0], folder)
    assert outside.read_text() == "mine"


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", ".hidden", "a/b", "manifest.json", "a\0b", "twice"])
async def test_a_manifest_whose_files_would_leave_the_folder_is_refused(
    remote: PackRegistry,
    registry_process: RegistryProcess,
    repository: str,
    opened: Callable[..., PackRegistry],
    tmp_path: Path,
    name: str,
) -> None:
    build_constant_pack(tmp_path / "pack")
    manifest = json.loads((tmp_path / "pack" / "manifest.json").read_text())
    manifest["files"] = [{**manifest["files"][0], "name": name}] * (2 if name == "twice" else 1)
    evil = json.dumps(manifest).encode()
    digest = f"sha256:{hashlib.sha256(evil).hexdigest()}"
    layer = {"mediaType": PACK_MANIFEST, "digest": digest, "size": len(evil)}

    def give(method: str, path: str, reply: Reply) -> Reply:
        return refusal(200).saying(evil if digest in path else json.dumps({"layers": [layer]}).encode())

    with (
        LyingRegistry(registry_process.port, give) as liar,
        pytest.raises(StoreFailed, match=r"is no pack: the (file name|manifest names)"),
    ):
        await opened(liar.authority, repository).fetch_as("evil", empty(tmp_path / "got"))
    shutil.copytree(tmp_path / "pack", tmp_path / "evil")
    rewrite(tmp_path / "evil" / "manifest.json", evil)
    with pytest.raises(PackInvalid):
        await remote.push_as(tmp_path / "evil", "evil")
    assert contents(tmp_path / "got") == {}
    assert {path.name for path in entries(tmp_path)} == {"pack", "evil", "got"}


async def test_a_pack_larger_than_any_upload_is_refused_before_its_files(
    registry_process: RegistryProcess, repository: str, opened: Callable[..., PackRegistry], tmp_path: Path
) -> None:
    build_constant_pack(tmp_path / "pack")
    manifest = json.loads((tmp_path / "pack" / "manifest.json").read_text())
    entry = {**manifest["files"][0], "size_bytes": packs.FILE_BYTES_LIMIT}
    manifest["files"] = [{**entry, "name": f"{i}.parquet"} for i in range(3)]
    large = json.dumps(manifest).encode()
    digest = f"sha256:{hashlib.sha256(large).hexdigest()}"
    layer = {"mediaType": PACK_MANIFEST, "digest": digest, "size": len(large)}

    def give(method: str, path: str, reply: Reply) -> Reply:
        return refusal(200).saying(large if digest in path else json.dumps({"layers": [layer]}).encode())

    with LyingRegistry(registry_process.port, give) as liar, pytest.raises(StoreFailed, match="bytes; allowed"):
        await opened(liar.authority, repository).fetch_as("large", empty(tmp_path / "got"))
    assert len(liar.asked) == 2
