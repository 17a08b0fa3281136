"""The network interface through which a node reaches the others, for gloo.

Gloo takes the address that the machine's own name resolves to: on many systems a loopback address,
or no address at all. NCCL finds the interface by itself.
"""

import os
import socket
import struct
from collections.abc import MutableMapping
from fcntl import ioctl

from fastgrpo.core.processes import local_world_size, world_size

CHOSEN = "GLOO_SOCKET_IFNAME"


def choose(environment: MutableMapping[str, str] = os.environ) -> None:
    """Name gloo's interface, the one towards MASTER_ADDR, where a run spans several nodes.

    An interface that the user has named stays.
    """
    if CHOSEN in environment:
        return
    if world_size(environment) == local_world_size(environment=environment):
        return
    name = towards(environment["MASTER_ADDR"])
    if name is not None:
        environment[CHOSEN] = name


def towards(host: str) -> str | None:
    """The interface from whose address this machine sends to a host.

    None: the interface is loopback, or the host's name is unknown.
    """
    try:
        addresses = socket.getaddrinfo(host, 9, socket.AF_INET, socket.SOCK_DGRAM)
        family, kind, protocol, _, address = addresses[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # a datagram socket: nothing is sent
            own = probe.getsockname()[0]
    except OSError:
        return None
    if own.startswith("127."):
        return None
    return next((name for _, name in socket.if_nameindex() if address_of(name) == own), None)


def address_of(interface: str) -> str | None:
    """The IPv4 address of an interface of this machine; None where it has none."""
    get_address = 0x8915  # SIOCGIFADDR of linux/sockios.h
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            name = struct.pack("256s", interface.encode()[:15])
            answer = ioctl(any_socket, get_address, name)
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])
