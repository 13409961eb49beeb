"""Says that the service is busy, where a request waited in vain for a connection."""

import logging
from contextvars import ContextVar
from http import HTTPStatus

from .errors import UNWOUND, Unwound
from .types import ASGIApp, Message, Receive, Scope, Send

_logger = logging.getLogger("asgi_dbsession")

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
    """Serve a request; instead of an error of the pool, or the 500 that it became, send 503."""
    waits: list[BaseException] = []
    is_answered = is_withheld = False

    async def withhold_errors_then_send(message: Message) -> None:
        nonlocal is_answered, is_withheld
        if message["type"] == "http.response.start":
            is_withheld = bool(waits) and message["status"] == HTTPStatus.INTERNAL_SERVER_ERROR
            is_answered = not is_withheld
        if is_withheld:
            raise Unwound
        await send(message)

    token = _waits_in_vain.set(waits)
    try:
        await serve(scope, receive, withhold_errors_then_send)
    except UNWOUND as error:
        if is_answered or not (is_withheld or _stems_from(error, waits)):
            raise
        is_withheld = True
    finally:
        _waits_in_vain.reset(token)
    if is_withheld:
        _logger.warning("Answered 503, for a request waited in vain: %s", waits[0])
        await _say_busy(retry_after, send)


def _stems_from(error: BaseException | None, waits: list[BaseException]) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(_stems_from(each, waits) for each in error.exceptions)
    while error is not None and not any(error is each for each in waits):
        error = error.__cause__ or error.__context__
    return error is not None


async def _say_busy(retry_after: int, send: Send) -> None:
    # https://www.rfc-editor.org/rfc/rfc9110#section-15.6.4
    headers = [(b"content-type", b"text/plain"), (b"retry-after", str(retry_after).encode())]
    status = HTTPStatus.SERVICE_UNAVAILABLE
    await send({"type": "http.response.start", "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": status.phrase.encode()})
