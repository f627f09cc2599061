"""The private network's hosts: one network namespace each, joined by veth pairs and a bridge.

In: names of hosts, and the speed of a link. Out: the namespace and address of each host, and the interface on which its
link can be heard. Runs inside the lab, and refuses to touch anything outside: all that it makes ends with the lab.

    host rank0 [eth0 10.77.0.1] --- rank0 \\
    host rank1 [eth0 10.77.0.2] --- rank1 --- bridge (the switch)
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from nodes.errors import NetworkError
from nodes.namespaces import inside, new_namespace
from nodes.tunnel import address_of

BRIDGE = "switch"
HOST_INTERFACE = "eth0"
MAX_HOSTS = 254

BURST_BYTES = 1 << 18
"""Bucket of the token bucket filter: four of the largest segments that a host hands over in one piece."""
QUEUE_MS = 200
"""Longest that a packet waits in a link's queue before it is dropped, as in a home router."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """One machine of the private network."""

    name: str
    namespace: int
    """Descriptor of its network namespace."""
    outer_interface: str
    """The switch's end of its link: what arrives there is what the host sent."""


def address(index: int) -> str:
    """The address of the host with this index."""
    return f"10.77.0.{index + 1}"


def hosts_file(names: Sequence[str]) -> str:
    """The names of the network, and of a tunnel in it, in the format of /etc/hosts. Names of IPv4 addresses are also
    asked for in IPv6 form."""
    addresses = {"127.0.0.1": "localhost"}
    for index, name in enumerate(names):
        addresses |= {address(index): name, address_of(index): f"{name}-inside"}
    lines = [f"{where} {name}\n::ffff:{where} {name}" for where, name in addresses.items()]
    return "\n".join(["::1 localhost", *lines, ""])


def loopback_up() -> None:
    """Makes 127.0.0.1 and ::1 of this namespace work."""
    with _kernel("loopback"), IPRoute() as route:
        route.link("set", index=_index(route, "lo"), state="up")


def build_hosts(names: Sequence[str], *, link_mbit: float | None) -> dict[str, Host]:
    """Makes hosts and switch, all up.

    Args:
        names: of the hosts; also of the switch's interfaces, so at most 15 characters.
        link_mbit: speed of each link in each direction, in Mbit/s; None for as fast as the machine can.

    Raises: NetworkError.
    """
    with _kernel("bridge"), IPRoute() as route:
        route.link("add", ifname=BRIDGE, kind="bridge")
        switch = _index(route, BRIDGE)
        route.link("set", index=switch, state="up")
    hosts = {}
    for index, name in enumerate(names):
        with _kernel(f"host {name}"), IPRoute() as route:
            namespace = new_namespace()
            route.link("add", ifname=name, kind="veth", peer={"ifname": HOST_INTERFACE, "net_ns_fd": namespace})
            outer = _index(route, name)
            _limit(route, outer, link_mbit)
            route.link("set", index=outer, master=switch, state="up")
            with inside(namespace), IPRoute() as host_route:
                inner = _index(host_route, HOST_INTERFACE)
                _limit(host_route, inner, link_mbit)
                host_route.addr("add", index=inner, address=address(index), prefixlen=24)
                for interface in (inner, _index(host_route, "lo")):
                    host_route.link("set", index=interface, state="up")
        hosts[name] = Host(name=name, namespace=namespace, outer_interface=name)
    return hosts


def _limit(route: IPRoute, interface: int, link_mbit: float | None) -> None:
    """Sets the speed at which an interface sends."""
    if link_mbit is None:
        return
    with _kernel("link speed (the tbf queue)"):
        rate = int(link_mbit * 1e6 / 8)
        route.tc("add", "tbf", interface, 0x10000, rate=rate, burst=BURST_BYTES, latency=f"{QUEUE_MS}ms")


def _index(route: IPRoute, name: str) -> int:
    return route.link_lookup(ifname=name)[0]


@contextlib.contextmanager
def _kernel(what: str) -> Iterator[None]:
    """Says which part of the network the kernel refused."""
    try:
        yield
    except (NetlinkError, OSError) as error:
        reason = error.args[1] if len(error.args) > 1 else error
        raise NetworkError(f"private network: {what}: the kernel of this machine refuses it: {reason}") from error
