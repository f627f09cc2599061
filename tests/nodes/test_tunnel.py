"""The tunnel between hosts: packets come out as they went in, and only where, and from whom, they should."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from attack.decode.recording import Recording
from harness.config import TrainConfig
from harness.errors import ConfigError
from nodes import tunnel as module
from nodes.certificates import context_of, make_certificates
from nodes.commands.lab import Lab, free_ports
from nodes.errors import NetworkError
from nodes.tunnel import Tunnel, address_of


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    make_certificates(folder, num_ranks=3)
    return folder


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, socket.socket]]:
    """In place of interfaces, sockets that keep packets apart: by rank, the job's end."""
    with contextlib.ExitStack() as stack:
        jobs: dict[int, socket.socket] = {}

        def make(rank: int) -> int:
            jobs[rank], ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            stack.enter_context(jobs[rank]).settimeout(10)
            return ours.detach()

        monkeypatch.setattr(module, "_make_device", make)
        yield jobs


def packet(source: int, target: int, payload: bytes) -> bytes:
    size = (20 + len(payload)).to_bytes(2, "big")
    ends = socket.inet_aton(address_of(source)) + socket.inet_aton(address_of(target))
    return b"\x45\0" + size + bytes(8) + ends + payload


def open_all(keys: dict[int, Path], stack: contextlib.ExitStack, *, deadline_s: float = 10.0) -> list[Exception]:
    hosts = [f"127.0.0.1:{port}" for port in free_ports(len(keys))]
    errors: list[Exception] = []

    def enter(rank: int) -> None:
        try:
            stack.enter_context(Tunnel(keys=keys[rank], rank=rank, hosts=hosts, deadline_s=deadline_s))
        except NetworkError as error:
            errors.append(error)

    ends = [threading.Thread(target=enter, args=(rank,)) for rank in keys]
    for end in ends:
        end.start()
    for end in ends:
        end.join(30)
    return errors


def test_packets_reach_their_rank_whole_and_in_order(keys: Path, devices: dict[int, socket.socket]) -> None:
    sent = [os.urandom(size) for size in (0, 1, 1000, 40_000, 64_000, 3)]
    with contextlib.ExitStack() as stack:
        assert not open_all(dict.fromkeys(range(3), keys), stack)
        for source, target in ((0, 1), (1, 0), (2, 0), (0, 2)):
            for payload in sent:
                devices[source].send(packet(source, target, payload))
                assert devices[target].recv(1 << 17) == packet(source, target, payload)
        devices[0].send(packet(2, 1, b"forged"))  # from rank 2's address, by rank 0
        devices[0].send(b"\x60" + bytes(60))  # IPv6
        devices[0].send(packet(0, 1, b"honest"))
        assert devices[1].recv(1 << 17) == packet(0, 1, b"honest")


def test_a_stranger_is_not_let_in(keys: Path, tmp_path: Path, devices: dict[int, socket.socket]) -> None:
    make_certificates(tmp_path, num_ranks=2)
    for rank in range(2):  # it knows everybody, and has a key of its own
        (tmp_path / f"rank{rank}.crt").write_bytes((keys / f"rank{rank}.crt").read_bytes())
    with contextlib.ExitStack() as stack:
        errors = open_all({0: keys, 1: tmp_path}, stack, deadline_s=1.0)
        assert len(errors) == 2, errors
        assert any("certificate" in str(error) for error in errors)


def test_another_rank_s_certificate_is_told_apart(keys: Path) -> None:
    ours, theirs = socket.socketpair()
    server = context_of(keys, 2, num_ranks=3, server_side=True)

    def serve() -> None:
        with server.wrap_socket(theirs, server_side=True) as connection:
            connection.recv(1)

    side = threading.Thread(target=serve, daemon=True)
    side.start()
    client = context_of(keys, 0, num_ranks=3, server_side=False).wrap_socket(ours)
    assert client.version() == "TLSv1.3"
    shown = client.getpeercert(binary_form=True)
    assert [ssl.PEM_cert_to_DER_cert((keys / f"rank{rank}.crt").read_text()) == shown for rank in range(3)] == [
        False,
        False,
        True,
    ]
    client.close()
    side.join(10)


def test_keys_are_their_owners_alone(tmp_path: Path) -> None:
    make_certificates(tmp_path, num_ranks=1)
    assert (tmp_path / "rank0.pem").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="a key is not replaced"):
        make_certificates(tmp_path, num_ranks=1)
    (tmp_path / "rank0.pem").chmod(0o640)
    with pytest.raises(ConfigError, match="others may read it; chmod 600 it"):
        context_of(tmp_path, 0, num_ranks=1, server_side=True)
    with pytest.raises(ConfigError, match="make keys with: gradtap keys"):
        Tunnel(keys=tmp_path / "none", rank=0, hosts=["a", "b"])
    with pytest.raises(ConfigError, match="wanted HOST or HOST:PORT"):
        Tunnel(keys=tmp_path, rank=0, hosts=["a:b"])


@pytest.mark.lab
def test_a_gloo_job_in_a_tunnel_shows_no_gradient(keys: Path, tmp_path: Path) -> None:
    train = TrainConfig(tensorboard=False, exchange="ddp", model="mlp:hidden=40", steps=2)
    done = Lab(out=tmp_path / "run", num_workers=2, hosts=True, tunnel=keys, train=train).run()
    assert done.ok, done.text
    found = Recording(tmp_path / "run" / "wire.pcapng").inspect()
    assert found["encrypted"] and found["steps"] == []
    # What has said nothing was not answered: the other end was not there yet.
    assert {flow["protocol"] for flow in found["flows"] if flow["bytes"]} == {"tls"}
    assert sum(entry["bytes"] for entry in found["sealed"]) > 2 * 2 * 4 * 123_000  # both ranks' sums, at both steps
