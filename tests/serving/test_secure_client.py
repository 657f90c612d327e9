"""TLS and headers against a Triton that insists on both, with certificates made here."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from forked import forks
from samp_client import BadRequest, Tls, Unavailable, connect, connect_async
from samp_client.errors import ClientError
from samp_loadtest.run import run_loadtest
from tiny import write_tiny

from samp_core import cli_live, control
from samp_core.server import Server

# Not the address that is called: only with the name given does the certificate fit.
NAME = "samp.example"
HEADER = {"triton-grpc-protocol-samp": "open"}
KEY = "0123456789abcdef"
LOCUSTFILE = Path(__file__).resolve().parents[2] / "loadtest/locustfile.py"


@dataclass(frozen=True)
class Secured:
    server: Server
    folder: Path

    @property
    def tls(self) -> Tls:
        files = (self.folder / name for name in ("ca.pem", "client.pem", "client.key"))
        return Tls(*files, server_name=NAME)


def openssl(folder: Path, *command: str) -> None:
    done = subprocess.run(["openssl", *command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def make_certificates(folder: Path) -> None:
    """ca.pem; server and client keys with certificates that it signed; other.pem, a stranger."""
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("ca", "other"):
        openssl(
            folder, "req", "-x509", *key, "-keyout", f"{name}.key", "-out", f"{name}.pem",
            "-subj", f"/CN={name}", "-days", "2",
        )  # fmt: skip
    (folder / "names").write_text(f"subjectAltName=DNS:{NAME}\n")
    for name in ("server", "client"):
        openssl(
            folder, "req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr",
            "-subj", f"/CN={name}",
        )  # fmt: skip
        openssl(
            folder, "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
            "-CAcreateserial", "-out", f"{name}.pem", "-days", "2", "-extfile", "names",
        )  # fmt: skip


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    make_certificates(folder)
    write_tiny(folder / "out")
    options = [
        "--grpc-use-ssl=true", "--grpc-use-ssl-mutual=true",
        f"--grpc-server-cert={folder / 'server.pem'}", f"--grpc-server-key={folder / 'server.key'}",
        f"--grpc-root-cert={folder / 'ca.pem'}",
        "--grpc-restricted-protocol=inference:samp=open",
        "--http-restricted-api=inference:samp=open",
    ]  # fmt: skip
    with Server.start(folder / "out", threads=1, options=options) as server:
        yield Secured(server, folder)


def test_both_clients_with_certificates_and_header(secured: Secured) -> None:
    with connect(secured.server.grpc, tls=secured.tls, headers=HEADER) as client:
        found = client.predict(["a"], "exact")

    async def work() -> None:
        async with connect_async(secured.server.grpc, tls=secured.tls, headers=HEADER) as client:
            again = await client.predict(["a"], "exact")
            assert again[0].scores == pytest.approx(found[0].scores, abs=1e-6)

    asyncio.run(work())
    header = {"Samp": "open"}
    with connect(secured.server.http, "http", headers=header) as client:
        assert client.predict(["a"], "exact")[0].label == found[0].label

    async def over_http() -> None:
        async with connect_async(secured.server.http, "http", headers=header) as client:
            assert (await client.predict(["a"], "exact"))[0].label == found[0].label

    asyncio.run(over_http())


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_without_the_header_the_door_is_shut(secured: Secured, protocol: str) -> None:
    if protocol == "grpc":
        client = connect(secured.server.grpc, tls=secured.tls, headers={"triton-grpc-x": "y"})
    else:
        client = connect(secured.server.http, "http")
    with client:
        assert client.tiers() == ("exact",)
        with pytest.raises(ClientError, match="restricted"):
            client.predict(["a"], "exact")


def test_the_wrong_certificates(secured: Secured) -> None:
    folder = secured.folder
    ca, cert, key = folder / "ca.pem", folder / "client.pem", folder / "client.key"
    stranger = {"cert": folder / "other.pem", "key": folder / "other.key"}
    for tls in (
        None,
        Tls(ca, cert, key),  # the certificate is not for 127.0.0.1
        Tls(folder / "other.pem", cert, key, NAME),
        Tls(ca, server_name=NAME),  # the server asks for one
        Tls(ca, server_name=NAME, **stranger),
    ):
        with (
            connect(secured.server.grpc, tls=tls, headers=HEADER, timeout_s=5) as client,
            pytest.raises(Unavailable),
        ):
            client.tiers()


def test_on_the_command_line(secured: Secured) -> None:
    folder = secured.folder
    where = (
        "predict", "--url", secured.server.grpc, "--tier", "exact", "--ca", folder / "ca.pem",
        "--cert", folder / "client.pem", "--key", folder / "client.key", "--server-name", NAME,
    )  # fmt: skip
    header = ("--header", "triton-grpc-protocol-samp=open")
    done = forks().samp(*where, *header, "--json", "a")
    assert done.code == 0, done.err
    rows = folder / "rows.jsonl"
    rows.write_text('{"text": "a"}\n{"text": "b"}\n')
    whole = forks().samp(*where, *header, "--in", rows, "--out", folder / "answers.jsonl")
    assert whole.code == 0, whole.err
    first = (folder / "answers.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["scores"] == json.loads(done.out)["scores"]
    assert "restricted" in forks().samp(*where, "a").out
    assert "NAME=VALUE" in forks().samp(*where, "--header", "none", "a").err


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """As `samp serve --key-file` starts it."""
    folder = tmp_path_factory.mktemp("keyed")
    write_tiny(folder / "out")
    (folder / "key").write_text(f"{KEY}\nnot this\n")
    options = [control.guard(cli_live.read_key(folder / "key"))]
    with Server.start(folder / "out", threads=1, options=options) as server:
        yield Secured(server, folder)


def test_a_key_for_http(keyed: Secured) -> None:
    """Strangers are refused; clients with the key, gRPC and samp go on."""
    server, out = keyed.server, keyed.folder / "out"
    with connect(server.grpc) as client:
        found = client.predict(["a"], "exact")
    with connect(server.http, "http") as client, pytest.raises(BadRequest, match="--header"):
        client.predict(["a"], "exact")
    with connect(server.http, "http", headers={"samp-key": KEY}) as client:
        assert client.predict(["a"], "exact")[0].label == found[0].label
    with pytest.raises(control.ControlError, match="restricted"):
        control.Control(server.http).unload("head_tiny")
    seen = forks().samp("status", out, "--json")
    assert seen.code == 0, seen.out
    assert seen.json[0]["tiers"][0]["answers"]
    assert server.activate(out, again=True)["loads"] == 4
    # Another user, or another machine, knows no more than the address.
    stranger = {"env": {"XDG_CACHE_HOME": str(keyed.folder / "nobody")}}
    seen = forks().samp("status", server.http, **stranger)
    assert (seen.code, len(seen.lines)) == (1, 1)
    assert "--header samp-key=..." in seen.err
    header = ("--header", f"samp-key={KEY}")
    seen = forks().samp("status", server.http, *header, "--json", **stranger)
    assert seen.code == 0, seen.err
    assert seen.json[0]["tiers"][0]["answers"]


def test_a_key_that_no_header_can_carry(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("short\n")
    refused = forks().samp("serve", tmp_path / "out", "--key-file", key)
    assert refused.code == 2
    assert "8 to 256 printable" in refused.err


def command_lines() -> list[str]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found.append(" ".join(process.cmdline()))
    return found


def test_load_with_a_key_by_two_workers(keyed: Secured) -> None:
    """Each of them sends it, none shows it in its command line; headers of one's own go with it."""
    seen: list[str] = []
    found = run_loadtest(
        keyed.server.http, "exact", protocol="http", users=4, seconds=2, workers=2,
        headers={"samp-key": KEY, "X-Trace": "a=b"},
        progress=lambda *_: seen.extend(command_lines()),
    )["exact"]  # fmt: skip
    assert found["requests"] > 0
    assert found["failures"] == 0
    assert any("--worker" in line for line in seen)
    assert not any(KEY in line for line in seen if "locust" in line)


def test_load_without_the_key_says_what_is_missing(keyed: Secured) -> None:
    where = ("loadtest", "--http", "--url", keyed.server.http, "--tier", "exact", "--users", 1)
    done = forks().samp(*where, "--seconds", 1)
    assert done.code == 1
    assert "--header samp-key=..." in done.err
    wrong = forks().samp(*where, "--header", "samp-key")
    assert wrong.code == 2
    assert "NAME=VALUE" in wrong.err


def test_the_highest_rate_behind_a_key(keyed: Secured) -> None:
    done = forks().samp(
        *("loadtest", "--http", "--url", keyed.server.http, "--tier", "exact", "--users", 16),
        *("--slo", "p95=2000ms", "--seconds", 1, "--budget", 5, "--workers", 2, "--json"),
        *("--png", keyed.folder / "curve.png", "--header", f"samp-key={KEY}"),
    )
    points = done.json["points"]
    assert points[0]["holds"], done
    assert sum(point["requests"] for point in points) > 0


def test_load_with_certificates(secured: Secured) -> None:
    folder = secured.folder
    done = forks().samp(
        *("loadtest", "--url", secured.server.grpc, "--tier", "exact", "--users", 2),
        *("--workers", 2, "--seconds", 2, "--ca", "ca.pem", "--cert", "client.pem"),
        *("--key", "client.key", "--server-name", NAME, "--json"),
        *("--header", "triton-grpc-protocol-samp=open"),
        cwd=folder,
    )
    assert done.code == 0, done.err
    assert done.json["exact"]["requests"] > 0
    assert done.json["exact"]["failures"] == 0
    over_http = ("loadtest", "--http", "--url", secured.server.http, "--tier", "exact", "--tls")
    assert "gRPC" in forks().samp(*over_http).err


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_plain_locust_with_a_header(secured: Secured, protocol: str) -> None:
    """The protocol of the address is found all the same, and TLS means gRPC."""
    folder, server = secured.folder, secured.server
    words = ["--header", "Samp=open", "--host", server.http]
    if protocol == "grpc":
        words = [
            *("--header", "triton-grpc-protocol-samp=open", "--host", server.grpc),
            *("--ca", "ca.pem", "--cert", "client.pem", "--key", "client.key"),
            *("--server-name", NAME),
        ]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless"),
            *("--only-summary", "-u", "1", "-t", "2s", "--tiers", "exact", *words),
        ],
        cwd=folder, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{protocol}:exact" in done.stdout + done.stderr


def test_the_header_is_read_from_tritons_own_options() -> None:
    one = ["--log-verbose=1", "--http-restricted-api=inference,health:k=v=w"]
    assert control.restricted(one) == {"k": "v=w"}
    assert control.restricted(["--http-restricted-api", "inference:k=v"]) == {"k": "v"}
    assert control.restricted(["--grpc-restricted-protocol=inference:k=v"]) == {}
