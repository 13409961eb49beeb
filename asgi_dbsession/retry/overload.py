"""Says that the service is busy, where a request waited in vain for a connection."""

import logging
from contextvars import ContextVar
from http import HTTPStatus

from sqlalchemy.exc import TimeoutError as PoolTimeout

from asgi_dbsession.errors import UNWOUND, Unwound
from asgi_dbsession.types import ASGIApp, Message, Receive, Scope, Send

_logger = logging.getLogger("asgi_dbsession")


class _Wait:
    """Whether a request waited in vain; set from below, where the context is another one."""

    is_in_vain: bool = False


_current: ContextVar[_Wait | None] = ContextVar("asgi_dbsession.wait", default=None)


def note_wait_in_vain() -> None:
    """Have the request know, also where its application swallows the error."""
    wait = _current.get()
    if wait is not None:
        wait.is_in_vain = True


async def answer_overload(
    serve: ASGIApp, retry_after: int, scope: Scope, receive: Receive, send: Send
) -> None:
    """Serve a request; instead of an error of the pool, or the 500 that it became, send 503."""
    wait = _Wait()
    is_answered = is_withheld = False

    async def withhold_errors_then_send(message: Message) -> None:
        nonlocal is_answered, is_withheld
        if message["type"] == "http.response.start":
            is_error = message["status"] == HTTPStatus.INTERNAL_SERVER_ERROR
            is_withheld = wait.is_in_vain and is_error
            is_answered = not is_withheld
        if is_withheld:
            raise Unwound
        await send(message)

    token = _current.set(wait)
    try:
        await serve(scope, receive, withhold_errors_then_send)
    except UNWOUND as error:
        is_withheld = is_withheld or (not is_answered and _stems_from_wait(error))
        if not is_withheld:
            raise
    finally:
        _current.reset(token)
    if is_withheld:
        _logger.warning("Waited in vain for a connection, answered 503: %r", scope["path"])
        await _say_busy(retry_after, send)


def _stems_from_wait(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, PoolTimeout):
        if isinstance(error, BaseExceptionGroup) and any(map(_stems_from_wait, error.exceptions)):
            return True
        error = error.__cause__ or error.__context__
    return error is not None


async def _say_busy(retry_after: int, send: Send) -> None:
    # https://www.rfc-editor.org/rfc/rfc9110#section-15.6.4
    headers = [(b"content-type", b"text/plain"), (b"retry-after", str(retry_after).encode())]
    status = HTTPStatus.SERVICE_UNAVAILABLE
    await send({"type": "http.response.start", "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": status.phrase.encode()})
