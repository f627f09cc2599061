"""CURVE on the ZeroMQ exchange: who has a key gets in, under its own name and no other."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from harness.errors import ConfigError, ExchangeError
from harness.exchange import CurveKeys, ShardServer, ZeroMQExchange, make_keys
from harness.exchange.curve import SERVER

RUN = bytes(8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "keys"
    make_keys(folder, num_ranks=2)
    return folder


def run_ranks(keys: list[CurveKeys | None], server_keys: CurveKeys | None, *, deadline_s: float = 20.0) -> list[object]:
    """The first average of each rank, which is rank + 1, or what it raised."""
    found: list[object] = [None] * len(keys)

    def work(rank: int, endpoint: str) -> None:
        try:
            with ZeroMQExchange(
                rank=rank, world_size=len(keys), run=RUN, endpoints=[endpoint], deadline_s=deadline_s, keys=keys[rank]
            ) as exchange:
                exchange.start(nn.Linear(1, 1), step=0)
                found[rank] = exchange.average(torch.full((2,), rank + 1.0), step=0).clone()
        except ExchangeError as error:
            found[rank] = error

    with ShardServer(run=RUN, world_size=len(keys), deadline_s=deadline_s, keys=server_keys) as server:
        ranks = [threading.Thread(target=work, args=(rank, server.endpoint)) for rank in range(len(keys))]
        for rank in ranks:
            rank.start()
        try:
            server.serve()
        except ExchangeError:
            pass
        for rank in ranks:
            rank.join(30)
    return found


def test_ranks_with_keys_average(folder: Path) -> None:
    keys = [CurveKeys.of_rank(folder, rank=rank, servers=[SERVER]) for rank in range(2)]
    found = run_ranks([*keys], CurveKeys.of_server(folder, num_ranks=2))
    assert all(torch.equal(one, torch.full((2,), 1.5)) for one in found if isinstance(one, torch.Tensor)) and all(
        isinstance(one, torch.Tensor) for one in found
    ), found


@pytest.mark.parametrize("case", ["without keys", "a stranger's key", "another rank's key"])
def test_nobody_else_gets_in(folder: Path, tmp_path: Path, case: str) -> None:
    make_keys(tmp_path / "other", num_ranks=2)
    stranger = CurveKeys.of_rank(tmp_path / "other", rank=1, servers=[SERVER])
    mine = CurveKeys.of_rank(folder, rank=0, servers=[SERVER])
    wrong = {
        "without keys": None,
        "a stranger's key": CurveKeys(public=stranger.public, secret=stranger.secret, peers=mine.peers),
        "another rank's key": mine,
    }[case]
    found = run_ranks([mine, wrong], CurveKeys.of_server(folder, num_ranks=2), deadline_s=1.0)
    assert all(isinstance(one, ExchangeError) for one in found), found


def test_keys_are_their_owners_alone_and_never_replaced(folder: Path, tmp_path: Path) -> None:
    assert {file.name for file in folder.iterdir()} == {
        f"{name}.{kind}" for name in ("server", "rank0", "rank1") for kind in ("secret", "public")
    }
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in folder.glob("*.secret"))
    with pytest.raises(ConfigError, match=r"server.secret: is there already; a key is not replaced"):
        make_keys(folder, num_ranks=3)
    make_keys(tmp_path / "keys", num_ranks=1)
    secret = tmp_path / "keys" / "rank0.secret"
    assert secret.read_text().strip() not in repr(CurveKeys.of_rank(tmp_path / "keys", rank=0, servers=[SERVER]))
    secret.chmod(0o644)
    with pytest.raises(ConfigError, match=r"rank0.secret: others may read it; chmod 600 it"):
        CurveKeys.of_rank(tmp_path / "keys", rank=0, servers=[SERVER])
    secret.chmod(0o600)
    secret.write_bytes((folder / "rank0.secret").read_bytes())
    with pytest.raises(ConfigError, match=r"rank0.public: is not the public key of rank0.secret"):
        CurveKeys.of_rank(tmp_path / "keys", rank=0, servers=[SERVER])
    secret.write_text("no key")
    with pytest.raises(ConfigError, match="wanted one line of 40 characters"):
        CurveKeys.of_rank(tmp_path / "keys", rank=0, servers=[SERVER])
    with pytest.raises(ConfigError, match=r"No such file or directory; make keys with: gradtap keys --out"):
        CurveKeys.of_rank(folder, rank=2, servers=[SERVER])
