"""A profile pack as an artifact of an OCI registry: how it is written there, and read without trusting a byte.

One image manifest whose layers are manifest.json and the pack's files, each blob named by its SHA-256 as the pack's own
manifest has it. The tag `sha256-<hex>` is the pack's digest; the digest of the image manifest is another one, since it
covers media types and annotations too. A reader takes from the image manifest one thing, where manifest.json is; that
has to have the pack's digest, and says names, sizes and digests of all else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oras.container import Container

from oracle_server import pack as packs
from oracle_server.errors import PackInvalid, QuotaExceeded, StoreFailed
from oracle_server.state.pack_files import check_files, disk_failures
from oracle_server.state.registry_transport import Transport

IMAGE_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
PACK = "application/vnd.step-oracle.pack.v1"
PACK_CONFIG = "application/vnd.step-oracle.pack.config.v1+json"
PACK_MANIFEST = "application/vnd.step-oracle.pack.manifest.v1+json"
PACK_FILE = "application/vnd.step-oracle.pack.file.v1"
PACK_DIGEST = "step-oracle.pack.digest"

_TITLE = "org.opencontainers.image.title"
_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")
_CONFIG = b"{}"


@dataclass(frozen=True, slots=True)
class Pushed:
    """A pack in a registry: its own digest, and that of the image manifest."""

    digest: str
    image_digest: str
    size_bytes: int


def tag_of(digest: str) -> str:
    """The tag a pack has by its digest."""
    return digest.replace(":", "-")


def push(transport: Transport, container: Container, folder: Path, alias: str = "") -> Pushed:
    """Write a checked pack, blobs first and tags last, so that a tag never names half a pack."""
    with disk_failures():
        data = (folder / packs.MANIFEST_FILE).read_bytes()
        manifest = packs.parse_manifest(data)
        check_files(manifest)
        digest = packs.digest_of(data)
        layers = [_blob(packs.MANIFEST_FILE, PACK_MANIFEST, hashlib.sha256(data).hexdigest(), len(data))]
        layers += [_blob(entry.name, PACK_FILE, entry.sha256, entry.size_bytes) for entry in manifest.files]
        for layer in layers:
            # By name, and the registry compares the bytes with the digest: a folder that changes meanwhile is refused.
            path = folder / layer["annotations"][_TITLE]
            transport.expect(transport.upload_blob(str(path), container, layer), 200, 201)
    config = {"mediaType": PACK_CONFIG, "digest": _digest(_CONFIG), "size": len(_CONFIG)}
    if not transport.blob_exists(config, container):
        transport.expect(transport.put_blob(_CONFIG, container, config), 201)
    image = {
        "schemaVersion": 2,
        "mediaType": IMAGE_MANIFEST,
        "artifactType": PACK,
        "config": config,
        "layers": layers,
        "annotations": {
            PACK_DIGEST: digest,
            _TITLE: manifest.name,
            "org.opencontainers.image.created": manifest.created,
            "org.opencontainers.image.licenses": manifest.licence,
        },
    }
    body = json.dumps(image, sort_keys=True, separators=(",", ":")).encode()
    for tag in filter(None, (tag_of(digest), alias)):
        url = f"{transport.prefix}://{container.manifest_url(tag)}"
        transport.expect(transport.do_request(url, "PUT", body, {"Content-Type": IMAGE_MANIFEST}), 201)
    return Pushed(digest, _digest(body), sum(entry.size_bytes for entry in manifest.files))


def fetch(transport: Transport, container: Container, reference: str, folder: Path, expected: str = "") -> Pushed:
    """Write the pack named by a tag, or by the digest of its image manifest, into an empty folder.

    What is written has the digests that the pack's own manifest states, and that has the digest `expected`, where one
    is. StoreFailed where it is not there or is something else.
    """
    where = f"{container.registry}/{container.api_prefix}{'@' if ':' in reference else ':'}{reference}"
    image = _read_image(transport, container, reference, where)
    place = _manifest_layer(image, where)
    data = b"".join(_read_blob(transport, container, place["digest"], place["size"], where))
    try:
        manifest = packs.parse_manifest(data)
        digest = packs.digest_of(data)
        check_files(manifest)
    except (PackInvalid, QuotaExceeded) as error:
        raise StoreFailed(f"{where} is no pack: {error.message}") from error
    if expected not in ("", digest):
        raise StoreFailed(
            f"{where} holds the pack {digest}, not {expected}; delete the tag there and push the pack again with "
            f"`step-oracle pack push FOLDER {container.registry}/{container.api_prefix}`"
        )
    _write(folder / packs.MANIFEST_FILE, iter([data]))
    for entry in manifest.files:
        _write(folder / entry.name, _read_blob(transport, container, f"sha256:{entry.sha256}", entry.size_bytes, where))
    return Pushed(digest, image["digest"], sum(entry.size_bytes for entry in manifest.files))


def delete(transport: Transport, container: Container, digest: str) -> None:
    """Remove the image manifest that has the pack's tag, with all its tags; its blobs are the registry's to collect."""
    url = f"{transport.prefix}://{container.manifest_url(tag_of(digest))}"
    found = transport.do_request(url, "GET", headers={"Accept": IMAGE_MANIFEST})
    if found.status_code == 404:
        return
    transport.expect(found, 200)
    url = f"{transport.prefix}://{container.manifest_url(_digest(found.content))}"
    transport.expect(transport.do_request(url, "DELETE"), 202, 404)


def _blob(name: str, media_type: str, sha256: str, size: int) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": f"sha256:{sha256}", "size": size, "annotations": {_TITLE: name}}


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _read_image(transport: Transport, container: Container, reference: str, where: str) -> dict[str, Any]:
    """The image manifest, with its own digest beside it."""
    url = f"{transport.prefix}://{container.manifest_url(reference)}"
    response = transport.do_request(url, "GET", headers={"Accept": IMAGE_MANIFEST})
    if response.status_code == 404:
        raise StoreFailed(f"{where} is not there; push the pack with `step-oracle pack push`, or give another name")
    transport.expect(response, 200)
    if ":" in reference and _digest(response.content) != reference:
        raise StoreFailed(f"the registry gives something else for {where}: {_digest(response.content)}")
    try:
        image = json.loads(response.content)
    except (ValueError, RecursionError) as error:
        raise StoreFailed(f"{where} is no pack: its image manifest is not JSON") from error
    if not isinstance(image, dict):
        raise StoreFailed(f"{where} is no pack: its image manifest is not an object")
    return {**image, "digest": _digest(response.content)}


def _manifest_layer(image: dict[str, Any], where: str) -> dict[str, Any]:
    """The descriptor of manifest.json."""
    layers = image.get("layers")
    for layer in layers if isinstance(layers, list) else ():
        if not isinstance(layer, dict) or layer.get("mediaType") != PACK_MANIFEST:
            continue
        size, digest = layer.get("size"), layer.get("digest")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            break
        if not isinstance(size, int) or not 0 < size <= packs.MANIFEST_BYTES_LIMIT:
            break
        return layer
    raise StoreFailed(
        f"{where} is no pack: it has no layer of the type {PACK_MANIFEST} with a digest and at most "
        f"{packs.MANIFEST_BYTES_LIMIT} bytes"
    )


def _read_blob(transport: Transport, container: Container, digest: str, size: int, where: str) -> Iterator[bytes]:
    """The bytes of a blob; StoreFailed, at the latest at its end, unless they are `size` and have this digest."""
    with transport.get_blob(container, digest, stream=True) as response:
        if response.status_code == 404:
            raise StoreFailed(f"the blob {digest} of {where} is not there; push the pack again")
        transport.expect(response, 200)
        announced = response.headers.get("Content-Length", str(size))
        if announced != str(size):
            raise StoreFailed(f"the registry announces {announced[:20]} bytes of the {size} of {digest} of {where}")
        hasher = hashlib.sha256()
        read = 0
        for piece in transport.read(response):
            read += len(piece)
            if read > size:
                raise StoreFailed(f"the registry sends more than the {size} bytes of {digest} of {where}")
            hasher.update(piece)
            yield piece
    if f"sha256:{hasher.hexdigest()}" != digest:
        raise StoreFailed(
            f"the registry's {digest} of {where} is damaged: it sends {read} of {size} bytes with the digest "
            f"sha256:{hasher.hexdigest()}; delete the blob there and push the pack again"
        )


def _write(path: Path, pieces: Iterator[bytes]) -> None:
    """A new file: never through a link, never over another."""
    with disk_failures():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            for piece in pieces:
                file.write(piece)
