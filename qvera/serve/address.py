"""Addresses of hosts."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether a host, by name or address, is this machine itself and reachable from no other."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
