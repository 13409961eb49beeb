"""Sends the responses of the live page, with headers that forbid caching and framing."""

from asgi_dbsession.types import Send

_NOTHING = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
# A content security policy that allows only the style, the script and the event stream of the page.
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
        send: The ASGI function `send` of the request.
        status: The HTTP status.
        text: The body.
        media_type: The media type without a charset; the charset is UTF-8.
        has_body: False for a HEAD request.
        policy: The Content-Security-Policy.
        **headers: More headers.
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
    """Start an event stream, with a header that stops proxies from buffering the stream."""
    own = {
        "content-type": "text/event-stream",
        "content-security-policy": _NOTHING,
        "x-accel-buffering": "no",
    }
    await _start(send, 200, own)


async def _start(send: Send, status: int, own: dict[str, str]) -> None:
    headers = [(key.encode(), value.encode()) for key, value in (_HEADERS | own).items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
