"""The server's configuration is read once and refuses what it does not know."""

from __future__ import annotations

from pathlib import Path

import pytest

from oracle_server.config import ServerConfig, TlsFiles, read_config
from oracle_server.errors import InvalidArgument
from oracle_server.rpc.channel import Access, read_access


def test_a_flag_goes_before_its_variable_and_that_before_the_default() -> None:
    environment = {"STEP_ORACLE_LISTEN": "127.0.0.1:1,unix:/s", "STEP_ORACLE_STATE_DIR": "/a", "HOME": "/h"}
    config = read_config(environment)
    assert config == ServerConfig(("127.0.0.1:1", "unix:/s"), "127.0.0.1:8471", Path("/a"), 5.0)
    assert read_config(environment, listen=["[::1]:5"], state_dir=Path("/b"), metrics="off") == ServerConfig(
        ("[::1]:5",), "off", Path("/b"), 5.0
    )
    assert read_config({"STEP_ORACLE_SHARDS": "4"}).shards == 4
    assert read_config({"STEP_ORACLE_SHARDS": "4"}, shards=2).shards == 2
    assert read_config({}).scheduling == "batch"
    assert read_config({"STEP_ORACLE_SCHEDULING": "other"}).scheduling == "other"
    assert read_config({}).leases
    assert not read_config({}, leases=False).leases
    assert not read_config({"STEP_ORACLE_LEASES": "0"}).leases
    shared = read_config({"STEP_ORACLE_DATABASE": "/d", "STEP_ORACLE_PACK_FOLDER": "/p"})
    assert (shared.database, shared.pack_folder) == (Path("/d"), Path("/p"))
    assert read_config({"STEP_ORACLE_DATABASE": "/d"}, database=Path("/e")).database == Path("/e")
    assert (config.database, config.pack_folder) == (None, None)
    assert read_config({"XDG_STATE_HOME": "/x"}).state_dir == Path("/x/step-oracle")


@pytest.mark.parametrize("address", ["127.0.0.1:8470", "localhost:0", "[::1]:80", "127.9.9.9:1", "unix:/s", "unix:s"])
def test_loopback_and_unix_sockets_are_allowed(address: str) -> None:
    assert read_config({}, listen=[address]).listen == (address,)


@pytest.mark.parametrize(
    "address", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "example.org:1", "127.0.0.1", "127.0.0.1:70000", "unix:", ":1"]
)
def test_everything_else_is_refused(address: str) -> None:
    with pytest.raises(InvalidArgument):
        read_config({}, listen=[address])


@pytest.mark.parametrize(
    "environment",
    [
        {"STEP_ORACLE_LISTEM": "x"},
        {"STEP_ORACLE_DRAIN_SECONDS": "60"},
        {"STEP_ORACLE_DRAIN_SECONDS": "nan"},
        {"STEP_ORACLE_LISTEN": ","},
        {"STEP_ORACLE_LEASES": "no"},
        {"STEP_ORACLE_SHARDS": "0"},
        {"STEP_ORACLE_SHARDS": "65"},
        {"STEP_ORACLE_SHARDS": "two"},
        {"STEP_ORACLE_SCHEDULING": "fifo"},
        {"STEP_ORACLE_TLS_CERT": "c"},
        {"STEP_ORACLE_TLS_KEY": "k"},
        {"STEP_ORACLE_TLS_CLIENT_CA": "a"},
        {"STEP_ORACLE_PACK_FOLDER": "/p"},
    ],
)
def test_a_variable_that_cannot_be_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument):
        read_config(environment)


def test_variables_of_the_shim_are_let_through() -> None:
    read_config({"STEP_ORACLE_TARGET": "x", "STEP_ORACLE_ENGINE_ID": "e", "STEP_ORACLE_DATA": "/d", "OTHER": "y"})


SECURED = {"STEP_ORACLE_TLS_CERT": "c", "STEP_ORACLE_TLS_KEY": "k", "STEP_ORACLE_OPERATOR_TOKEN_FILE": "o"}


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "example.org:1"])
def test_an_address_beyond_loopback_needs_tls_and_credentials(address: str) -> None:
    assert read_config(SECURED, listen=[address]).listen == (address,)
    for name in SECURED:
        with pytest.raises(InvalidArgument):
            read_config({key: value for key, value in SECURED.items() if key != name}, listen=[address])


def test_tls_and_the_operators_file_come_from_flags_or_variables() -> None:
    config = read_config(SECURED)
    assert (config.tls, config.operator_token_file) == (TlsFiles("c", "k"), Path("o"))
    config = read_config(SECURED, tls_cert=Path("d"), tls_client_ca=Path("a"), operator_token_file=Path("p"))
    assert (config.tls, config.operator_token_file) == (TlsFiles("d", "k", "a"), Path("p"))
    assert (read_config({}).tls, read_config({}).operator_token_file) == (None, None)


def test_the_metrics_stay_on_loopback() -> None:
    with pytest.raises(InvalidArgument):
        read_config(SECURED, metrics="0.0.0.0:1")


def test_a_clients_certificate_is_read_only_where_it_speaks_tls() -> None:
    both = {"STEP_ORACLE_TLS_CERT": "c", "STEP_ORACLE_TLS_KEY": "k"}
    assert read_access({}) == Access()
    assert read_access(both) == Access()
    assert read_access(both | {"STEP_ORACLE_TLS_CA": "a", "STEP_ORACLE_TOKEN_FILE": "t"}) == Access("a", "c", "k", "t")
    with pytest.raises(InvalidArgument, match="needs its key"):
        read_access({"STEP_ORACLE_TLS_CA": "a", "STEP_ORACLE_TLS_CERT": "c"})
