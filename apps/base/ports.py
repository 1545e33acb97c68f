"""Sockets that a server of ours listens on. What cannot be used is one line that names it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import ipaddress
import re
import socket
import struct
import sys
from collections.abc import Iterable
from typing import Any

LOCAL = "127.0.0.1"
"""The address that this machine alone can reach."""
_HOST = re.compile(r"([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{0,5})?")


def check_port(port: int, host: str = LOCAL) -> None:
    """Raise a ValueError for a host that is not of this machine, or a port that is invalid or in use."""
    bound(port, host).close()


def bound(port: int, host: str = LOCAL) -> socket.socket:
    """Return a socket that listens on a port.

    Args:
        port: its number; 0 takes a free one.
        host: an address or a name of this machine; "0.0.0.0" and "::" are all its addresses.

    Raises:
        ValueError: the host is unknown or not of this machine, or the port is out of range, in use, or the system's.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port={port} must be 0 to 65535")
    family, address = _addresses(host, port)[0]
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise ValueError(f"host={host} is no address of this machine") from None
        raise ValueError(f"port={port} cannot be used ({error.strerror}): give another --port, or 0 for any") from None
    return listening


def take_no_more(listening: socket.socket) -> None:
    """Let no further connection begin at a socket, where the system can: closing it resets one that has begun."""
    # A filter of Linux (SO_ATTACH_FILTER, 26): no packet with SYN, flag 2 in byte 13 of the TCP header, is taken.
    steps = ((0x30, 0, 0, 13), (0x45, 0, 1, 2), (0x06, 0, 0, 0), (0x06, 0, 0, 2**32 - 1))
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel without it
            listening.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HP", len(steps), ctypes.addressof(program)))


def is_local(host: str) -> bool:
    """Tell whether only this machine can reach a host.

    Raises:
        ValueError: the host is unknown.
    """
    return all(ipaddress.ip_address(address[0].partition("%")[0]).is_loopback for _, address in _addresses(host, 0))


def url_of(listening: socket.socket) -> str:
    """Return the address of a page at a socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def host_of(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """Return the host that a request is addressed to, in lower case and without its port.

    Args:
        headers: of the request, their names in lower case.

    Returns:
        A name, an IPv4 address, or an IPv6 address in brackets; None: the request has no Host header, several, or one
        that is not a host with an optional port.
    """
    hosts = [value.decode("latin-1").lower() for name, value in headers if name == b"host"]
    match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
    return match and match[1]


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
    """Return a host's addresses as family and address, IPv4 first."""
    try:
        known = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # UnicodeError: a part of a name that is empty or too long
        raise ValueError(f"host={host} is not known: give an address of this machine, such as {LOCAL}") from None
    return sorted(((family, address) for family, *_, address in known), key=lambda own: own[0] != socket.AF_INET)
