"""Gloo's interface on several nodes: the one on the way to the others, never loopback."""

import socket

import pytest

from fastgrpo.parallel import interface

TWO_NODES = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
TWO_NODES |= {"MASTER_ADDR": "10.1.2.3"}


def test_the_address_of_loopback_is_what_everybody_knows() -> None:
    assert interface.address_of("lo") == "127.0.0.1"
    assert interface.address_of("no-such-one") is None


def test_the_way_to_an_own_address_is_the_interface_that_has_it() -> None:
    addresses = {name: interface.address_of(name) for _, name in socket.if_nameindex()}
    for name, address in addresses.items():
        if address is not None:
            assert interface.towards(address) == (None if address.startswith("127.") else name)
    assert interface.towards("no-such-host.invalid") is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (TWO_NODES, "eth7"),
        (TWO_NODES | {"GLOO_SOCKET_IFNAME": "mine"}, "mine"),
        (TWO_NODES | {"LOCAL_WORLD_SIZE": "16"}, None),
        ({}, None),
    ],
)
def test_it_is_named_for_several_nodes_where_nobody_has(
    given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interface, "towards", {"10.1.2.3": "eth7"}.get)
    environment = dict(given)
    interface.choose(environment)
    assert environment.get("GLOO_SOCKET_IFNAME") == expected
