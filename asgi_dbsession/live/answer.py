"""Sends the web page that shows database connections. Its headers forbid caches and frames."""

from asgi_dbsession.types import Send

_NOTHING = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
# The header Content-Security-Policy of `LivePage` (the web page that shows database connections).
# Browsers then use only the page's own style, script and event stream.
CSS_AND_SCRIPT = (
    _NOTHING + "; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'"
)
_HEADERS = {
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


async def answer(
    send: Send,
    status: int,
    text: str,
    media_type: str = "text/plain",
    *,
    has_body: bool = True,
    policy: str = _NOTHING,
    **headers: str,
) -> None:
    """Send a complete HTTP response.

    Args:
        send: The `send` function of the request.
        status: The HTTP status.
        text: The body of the response.
        media_type: The media type, without a charset. The charset is always UTF-8.
        has_body: False for the response to a HEAD request.
        policy: The value of the header Content-Security-Policy.
        **headers: Further headers.
    """
    body = text.encode()
    own = {
        "content-type": f"{media_type}; charset=utf-8",
        "content-length": str(len(body)),
        "content-security-policy": policy,
        **headers,
    }
    await _start(send, status, own)
    await send({"type": "http.response.body", "body": body if has_body else b""})


async def begin_events(send: Send) -> None:
    """Start an event stream, with a header that forbids proxies to buffer it."""
    own = {
        "content-type": "text/event-stream",
        "content-security-policy": _NOTHING,
        "x-accel-buffering": "no",
    }
    await _start(send, 200, own)


async def _start(send: Send, status: int, own: dict[str, str]) -> None:
    headers = [(key.encode(), value.encode()) for key, value in (_HEADERS | own).items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
