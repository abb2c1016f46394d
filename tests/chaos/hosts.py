"""On which hosts the stand's parts run: loopback addresses, or network namespaces (links.py)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """An address, and what a command is prefixed with to run there."""

    address: str
    prefix: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hosts:
    """Where each part runs."""

    head: Host
    nodes: tuple[Host, ...]
    """Hosts of the worker nodes, one CPU each."""
    control: Host
    """Of the API and the reconciler; its address is where clients reach the API."""
    store: str
    """Address at which everybody reaches S3."""
    serve: str
    """Address of the Serve proxy on the head."""
    is_loopback: bool = True


LOOPBACK = Hosts(
    # Not 127.0.0.1, which Ray turns into the machine's outside address; and not the same twice, because a
    # driver looks for the Ray node of its own address.
    head=Host("127.0.0.2"),
    nodes=(Host("127.0.0.3"),),
    control=Host("127.0.0.1"),
    store="127.0.0.1",
    serve="127.0.0.1",
)
