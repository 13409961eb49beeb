"""Decides which clients may see the live page."""

from collections.abc import Callable
from ipaddress import ip_address
from typing import Any, TypeAlias

from asgi_dbsession.types import Scope

# A function that returns True if the client of a request may see the page.
Allow: TypeAlias = Callable[[Scope], bool]

# The headers that a proxy adds. A request with one of these headers came through a proxy, or
# pretends that it did.
_OF_PROXIES = ("forwarded", "via", "x-real-ip", "x-client-ip", "true-client-ip", "cf-connecting-ip")
_OWN_NAMES = ("localhost", "127.0.0.1", "[::1]")


def is_local(scope: Scope) -> bool:
    """Return True if a request comes from the same machine, and not through a proxy.

    The client address and the requested host must be this machine. The check of the host refuses
    requests of a foreign web page whose host name resolves to 127.0.0.1. A request with a header of
    a proxy is refused, because the server may take the client address from such a header.
    """
    headers = [(_text(key).lower(), _text(value)) for key, value in scope.get("headers", ())]
    if any(key in _OF_PROXIES or key.startswith("x-forwarded") for key, _ in headers):
        return False
    hosts = [value for key, value in headers if key == "host"]
    return _is_loopback(scope.get("client")) and len(hosts) == 1 and _is_own_name(hosts[0])


def _is_loopback(client: Any) -> bool:
    try:
        address = ip_address(client[0])
    # Without a client address, for example on a Unix socket, the client does not count as local.
    except (TypeError, ValueError, LookupError):
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def _is_own_name(host: str) -> bool:
    name, _, port = host.rpartition(":")
    return host.lower() in _OWN_NAMES or (name.lower() in _OWN_NAMES and port.isdecimal())


def _text(value: bytes) -> str:
    return bytes(value).decode("latin-1")
