"""Answers 503 if a request got no connection of the pool within `pool_timeout`."""

import logging
from collections.abc import Callable
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session
from typing_extensions import override

from asgi_dbsession.session.companion import Companion, Connect, Step
from asgi_dbsession.session.end import End
from asgi_dbsession.session.managed import ManagedSession
from asgi_dbsession.types import ASGIApp, Message, Receive, Scope, Send
from asgi_dbsession.unit.observer import UnitObserver

from .causes import causes
from .withholding import Withholding

_logger = logging.getLogger("asgi_dbsession")


class Overload(UnitObserver):
    """Answers 503 if a request fails because it got no connection within `pool_timeout`.

    Args:
        app: The ASGI application that serves the request.
        retry_after: After how many seconds the client may try again: the header `Retry-After`.
    """

    def __init__(self, app: ASGIApp, retry_after: int) -> None:
        self._app = app
        self._retry_after = retry_after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request. Answer 503 if it fails because no connection became free."""
        wait = _Wait()
        token = _current.set(wait)
        try:
            await wait.serve(self._app, scope, receive, send)
        finally:
            _current.reset(token)
        if wait.is_withheld:
            _logger.warning(
                "No connection became free within `pool_timeout`; answered 503: %a", scope["path"]
            )
            await _send_unavailable(self._retry_after, send)

    @override
    def session_opened(self, unit: Any, database: Any, opened: ManagedSession[Any]) -> None:
        on_pool_timeout(opened.companion, _record_failure)

    @override
    def work_ended(self, unit: Any, end: End, steps: dict[Any, list[Step]]) -> None:
        # The application has stored work although its status is 500. A 503 would invite the client
        # to repeat this work.
        wait = _current.get()
        if wait is not None and end.succeeded and end.had_work and not unit.is_inner:
            wait.has_failed = False


def on_pool_timeout(companion: Companion, function: Callable[[], None]) -> None:
    """Call `function` each time a session gets no connection of its pool within `pool_timeout`.

    Args:
        companion: The object with the data that this package attaches to the session.
        function: The function to call.
    """

    def connect_or_tell(connect: Connect, session: Session, engine: Engine) -> Connection:
        try:
            return connect(session, engine)
        except PoolTimeout:
            function()
            raise

    companion.wrap_connect(connect_or_tell)


def _record_failure() -> None:
    wait = _current.get()
    if wait is not None:
        wait.has_failed = True


class _Wait(Withholding):
    """One HTTP request. `has_failed` is True if it got no connection within `pool_timeout`.

    The context variable `_current` has this object, so that all tasks of the request can set
    `has_failed`.
    """

    has_failed: bool = False

    @override
    def withholds_message(self, message: Message) -> bool:
        is_start: bool = message["type"] == "http.response.start"
        is_error = is_start and message["status"] == HTTPStatus.INTERNAL_SERVER_ERROR
        return self.has_failed and is_error

    @override
    def withholds_error(self, error: BaseException) -> bool:
        return any(isinstance(each, PoolTimeout) for each in causes(error))


_current: ContextVar[_Wait | None] = ContextVar("asgi_dbsession.wait", default=None)


async def _send_unavailable(retry_after: int, send: Send) -> None:
    # The header `Retry-After` is described in https://www.rfc-editor.org/rfc/rfc9110#section-15.6.4
    headers = [(b"content-type", b"text/plain"), (b"retry-after", str(retry_after).encode())]
    status = HTTPStatus.SERVICE_UNAVAILABLE
    await send({"type": "http.response.start", "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": status.phrase.encode()})
