"""Says that the service is busy, where a request waited in vain for a connection."""

from contextvars import ContextVar
from http import HTTPStatus

from .errors import UNWOUND, Unwound
from .types import ASGIApp, Message, Receive, Scope, Send

_ERROR = HTTPStatus.INTERNAL_SERVER_ERROR

_waits_in_vain: ContextVar[list[BaseException] | None] = ContextVar(
    "asgi_dbsession.waits_in_vain", default=None
)


def note_wait_in_vain(error: BaseException) -> None:
    """Have the request know, also where its application swallows the error."""
    waits = _waits_in_vain.get()
    if waits is not None:
        waits.append(error)


async def answer_overload(
    serve: ASGIApp, retry_after: int, scope: Scope, receive: Receive, send: Send
) -> None:
    """Serve a request; instead of an error of the pool, or a 5xx that it became, send 503."""
    waits: list[BaseException] = []
    is_answered = False

    async def withhold_errors_then_send(message: Message) -> None:
        nonlocal is_answered
        is_start = message["type"] == "http.response.start"
        if waits and not is_answered and not (is_start and message["status"] < _ERROR):
            raise Unwound
        is_answered = is_answered or is_start
        await send(message)

    token = _waits_in_vain.set(waits)
    try:
        await serve(scope, receive, withhold_errors_then_send)
    except UNWOUND:
        if is_answered or not waits:
            raise
    finally:
        _waits_in_vain.reset(token)
    if waits and not is_answered:
        await _say_busy(retry_after, send)


async def _say_busy(retry_after: int, send: Send) -> None:
    # https://www.rfc-editor.org/rfc/rfc9110#section-15.6.4
    headers = [(b"content-type", b"text/plain"), (b"retry-after", str(retry_after).encode())]
    status = HTTPStatus.SERVICE_UNAVAILABLE
    await send({"type": "http.response.start", "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": status.phrase.encode()})
