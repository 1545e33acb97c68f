"""A port or a host that cannot be had is one line."""

from __future__ import annotations

import socket

import pytest

from apps.base.ports import bound, check_port, is_local, url_of


def test_a_free_port_and_one_in_use():
    with bound(0) as listening:
        port = listening.getsockname()[1]
        assert url_of(listening) == f"http://127.0.0.1:{port}"
        with pytest.raises(ValueError, match=rf"^port={port} cannot be used \(Address already in use\)"):
            check_port(port)
    check_port(port)


def test_a_number_that_is_no_port():
    with pytest.raises(ValueError, match=r"^port=65536 must be 0 to 65535$"):
        check_port(65536)


def test_hosts(monkeypatch):
    assert is_local("127.0.0.1")
    assert not is_local("0.0.0.0")
    with pytest.raises(ValueError, match=r"^host=192\.0\.2\.1 is no address of this machine$"):  # RFC 5737
        check_port(0, "192.0.2.1")

    def unknown(*arguments, **options):
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ValueError, match=r"^host=no\.such\.host is not known: "):
        is_local("no.such.host")
