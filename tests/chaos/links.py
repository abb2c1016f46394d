"""Hosts in network namespaces, and links that lose everything without a word.

Four hosts on one bridge: the Ray head, two worker nodes, and the control plane, which clients reach over a
link of its own. S3 is on the bridge. A cut takes a host's cable off the bridge: both ends stay up, every
packet is lost, nobody is told. Needs root and `ip`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.chaos.cases import Case
from tests.chaos.hosts import Host, Hosts

BRIDGE = "clchaos-br"
NETWORK, CLIENTS = "10.77.0", "10.78.0"
CUTS = (Case("node", "training", action="cut"), Case("control", "training", task=1, action="cut"))
"""The link of a worker node that trains, and the link from the control plane to Ray and S3."""
CONTROL_CUT_S = 40.0
_NAMES = {"head": 10, "node0": 11, "node1": 12, "control": 20}
"""Host and the last part of its address."""


def why_no_namespaces() -> str | None:
    """Say why this machine cannot make network namespaces; None when it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the command ip (iproute2)"
    probe = subprocess.run(["ip", "netns", "add", "clchaos-probe"], capture_output=True, text=True)
    if probe.returncode != 0:
        return f"network namespaces are refused: {probe.stderr.strip()}"
    _ip("netns", "delete", "clchaos-probe")
    return None


@contextmanager
def hosts_in_namespaces() -> Iterator[Hosts]:
    """Make the namespaces, and remove them after the block. Raises RuntimeError when one cannot be made."""
    try:
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("address", "add", f"{NETWORK}.254/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        for name, number in _NAMES.items():
            _add_host(name, f"{NETWORK}.{number}")
        _add_cable("control", f"{_cable('control')}b", "eth1", f"{CLIENTS}.2")
        _ip("address", "add", f"{CLIENTS}.1/24", "dev", f"{_cable('control')}b")
        yield Hosts(
            head=_host("head"),
            nodes=(_host("node0"), _host("node1")),
            control=Host(f"{CLIENTS}.2", _host("control").prefix),
            store=f"{NETWORK}.254",
            serve=f"{NETWORK}.{_NAMES['head']}",
            is_loopback=False,
        )
    finally:
        for name in _NAMES:
            with suppress(RuntimeError):  # it was not made
                _ip("netns", "delete", _namespace(name))
        with suppress(RuntimeError):
            _ip("link", "delete", BRIDGE)


def cut(name: str) -> None:
    """Lose everything that a host sends to the others and gets from them, without a word."""
    _ip("link", "set", _cable(name), "nomaster")


def heal(name: str) -> None:
    """Connect a host again."""
    _ip("link", "set", _cable(name), "master", BRIDGE)


def _add_host(name: str, address: str) -> None:
    _ip("netns", "add", _namespace(name))
    _ip("-n", _namespace(name), "link", "set", "lo", "up")
    _add_cable(name, _cable(name), "eth0", address)
    heal(name)


def _add_cable(name: str, outer: str, inner: str, address: str) -> None:
    """Connect a namespace with this one by a pair of interfaces."""
    _ip("link", "add", outer, "type", "veth", "peer", "name", inner, "netns", _namespace(name))
    _ip("-n", _namespace(name), "address", "add", f"{address}/24", "dev", inner)
    _ip("-n", _namespace(name), "link", "set", inner, "up")
    _ip("link", "set", outer, "up")


def _host(name: str) -> Host:
    ip = shutil.which("ip") or "ip"
    return Host(f"{NETWORK}.{_NAMES[name]}", (ip, "netns", "exec", _namespace(name)))


def _namespace(name: str) -> str:
    return f"clchaos-{name}"


def _cable(name: str) -> str:
    return f"clc-{name}"


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
