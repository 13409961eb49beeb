"""Decides which clients may see the web page that shows the database connections (`LivePage`)."""

from collections.abc import Callable
from ipaddress import ip_address
from typing import Any, TypeAlias

from asgi_dbsession.types import Scope

# A function that decides if a client may see `LivePage`, the web page that shows the database
# connections. It takes the ASGI scope of the client's request, and returns True or False.
Allow: TypeAlias = Callable[[Scope], bool]

# Proxies add these headers to requests. So a request with one of these headers may come from
# another machine, through a proxy on this machine. `is_local` returns False for such a request.
_OF_PROXIES = ("forwarded", "via", "x-real-ip", "x-client-ip", "true-client-ip", "cf-connecting-ip")
_OWN_NAMES = ("localhost", "127.0.0.1", "[::1]")


def is_local(scope: Scope) -> bool:
    """Return True if a request comes from the same machine, and not through a proxy.

    Both the address of the client and the requested host must be this machine. The check of the
    host protects against DNS rebinding: a foreign web page in a local browser may have a host name
    that resolves to 127.0.0.1, and then its requests come from this machine. A request with a
    header of a proxy is refused, because the server may have read the address of the client from
    this header.
    """
    headers = [(_text(key).lower(), _text(value)) for key, value in scope.get("headers", ())]
    if any(key in _OF_PROXIES or key.startswith("x-forwarded") for key, _ in headers):
        return False
    hosts = [value for key, value in headers if key == "host"]
    return _is_loopback(scope.get("client")) and len(hosts) == 1 and _is_own_name(hosts[0])


def _is_loopback(client: Any) -> bool:
    try:
        address = ip_address(client[0])
    # The ASGI scope has no IP address of the client, for example because the server listens on a
    # Unix socket. So the client may be on another machine, and must not count as local.
    except (TypeError, ValueError, LookupError):
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def _is_own_name(host: str) -> bool:
    name, _, port = host.rpartition(":")
    return host.lower() in _OWN_NAMES or (name.lower() in _OWN_NAMES and port.isdecimal())


def _text(value: bytes) -> str:
    return bytes(value).decode("latin-1")
