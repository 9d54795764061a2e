"""Addresses of hosts, and whose pages may call a server that asks for no key."""

import ipaddress
import socket


def is_loopback(host: str) -> bool:
    """Whether a host, by name or address, is this machine itself and reachable from no other."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def name_of(host: str) -> str:
    """The name or address in a Host header, without its port and brackets."""
    name = host.rsplit(":", 1)[0] if host.count(":") == 1 or "]:" in host else host
    return name.strip("[]")


def is_of_other_site(host: str, origin: str | None) -> bool:
    """Whether a call comes from a page that another site has sent; its browser says so in ``Origin``."""
    return origin is not None and origin.partition("://")[2] != host


def is_own_name(host: str, listens_on: str) -> bool:
    """Whether a Host header names this machine, as seen from where the server listens.

    A page of another site may have its own name point to this machine (DNS rebinding); then the header has that name.
    An address can't be rebound, so a server that others can reach takes any.
    """
    name = name_of(host)
    if is_loopback(name):
        return True
    if is_loopback(listens_on):
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in (listens_on, socket.gethostname(), socket.getfqdn())
    return True
