"""CURVE on the ZeroMQ exchange: who a peer is, and nobody else reads along.

    DIR/server.secret, DIR/server.public        of the parameter servers
    DIR/rank0.secret,  DIR/rank0.public, ...    of each rank

Each file is one line of 40 characters, a Curve25519 key in Z85 (RFC 32); a secret one is its owner's alone, mode 0600.
A rank needs its own secret key and the public ones of those who serve it; a server its own secret key, and the ranks'
public ones: no other client gets in, and none under another rank's name. Knows keys and sockets, no messages.

References: RFC 26 (CurveZMQ), RFC 27 (ZAP).
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import zmq
from zmq.auth.thread import ThreadAuthenticator

from harness.errors import ConfigError

SERVER = "server"
_KEY = re.compile(rb"[!-~]{40}")


def make_keys(folder: Path, *, num_ranks: int) -> list[Path]:
    """Writes a pair of keys for the servers and one for each rank. Replaces none.

    Returns: the files. Raises: ConfigError, OSError.
    """
    _check_library()
    folder.mkdir(parents=True, exist_ok=True)
    names = [SERVER, *(f"rank{rank}" for rank in range(num_ranks))]
    files = [folder / f"{name}.{kind}" for name in names for kind in ("secret", "public")]
    if there := [file for file in files if file.exists()]:
        raise ConfigError(f"{there[0]}: is there already; a key is not replaced: name another folder, or delete it")
    for name in names:
        public, secret = zmq.curve_keypair()
        for kind, key, mode in (("secret", secret, 0o600), ("public", public, 0o644)):
            # The mode from the start: nobody may read it before it is set.
            with open(os.open(folder / f"{name}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(key + b"\n")
    return files


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CurveKeys:
    """What one process needs."""

    public: bytes
    secret: bytes = dataclasses.field(repr=False)
    peers: tuple[bytes, ...]
    """Public keys: of the servers, for a rank as their client, in the order of their shards; of the ranks, in theirs,
    for who serves."""

    @classmethod
    def of_rank(cls, folder: Path, *, rank: int, servers: Sequence[str]) -> CurveKeys:
        """For a client. `servers`: whose they are, `server` or `rank0` and so on. Raises: ConfigError."""
        return cls._read(folder, f"rank{rank}", servers)

    @classmethod
    def of_server(cls, folder: Path, *, num_ranks: int, name: str = SERVER) -> CurveKeys:
        """For who serves; `name` is that of the rank, where ranks serve. Raises: ConfigError."""
        return cls._read(folder, name, [f"rank{rank}" for rank in range(num_ranks)])

    @classmethod
    def _read(cls, folder: Path, name: str, peers: Iterable[str]) -> CurveKeys:
        _check_library()
        public, secret = (_read(folder / f"{name}.{kind}") for kind in ("public", "secret"))
        if zmq.curve_public(secret) != public:
            raise ConfigError(f"{folder / name}.public: is not the public key of {name}.secret")
        return cls(public=public, secret=secret, peers=tuple(_read(folder / f"{peer}.public") for peer in peers))

    def secure(self, socket: zmq.Socket, *, server: int | None = None) -> None:
        """Before it is connected to this server, or, with None, bound."""
        socket.curve_secretkey, socket.curve_publickey = self.secret, self.public
        if server is None:
            socket.curve_server = True
        else:
            socket.curve_serverkey = self.peers[server]

    def rank_of(self, user: str) -> int | None:
        """The rank whose key a connection was made with, by what ZAP calls its user."""
        key = user.encode()
        return self.peers.index(key) if key in self.peers else None

    def admit(self, context: zmq.Context) -> ThreadAuthenticator:
        """Lets nobody but the peers into this context's servers, until it is stopped."""
        authenticator = ThreadAuthenticator(context)
        authenticator.start()
        authenticator.configure_curve_callback(credentials_provider=_Guest(self.peers))
        return authenticator


class _Guest:
    """What pyzmq asks."""

    def __init__(self, keys: tuple[bytes, ...]) -> None:
        self._keys = keys

    def callback(self, domain: str, key: bytes) -> bool:
        return key in self._keys


def _read(file: Path) -> bytes:
    try:
        mode, text = file.stat().st_mode, file.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; make keys with: gradtap keys --out {file.parent}") from error
    if file.suffix == ".secret" and mode & 0o077:
        raise ConfigError(f"{file}: others may read it; chmod 600 it, or make new keys")
    if not _KEY.fullmatch(text):
        raise ConfigError(f"{file}: wanted one line of 40 characters, a key, got {len(text)} bytes")
    return text


def _check_library() -> None:
    # Without it, a socket would be left in clear.
    if not zmq.has("curve"):
        raise ConfigError("this libzmq was built without CURVE: install pyzmq's own wheel")
