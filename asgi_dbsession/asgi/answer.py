"""Answers a request whose COMMIT failed: sends an error response, or raises the error of COMMIT."""

from collections.abc import Callable
from typing import TypeAlias

from asgi_dbsession.errors import AbortRequest, ConfigurationError, ForbiddenWrite, PrematureClose
from asgi_dbsession.types import ASGIApp, Receive, Scope, Send
from asgi_dbsession.unit.attempt import running_attempt

from .rules import wrong_result

OnCommitError: TypeAlias = Callable[[Exception], ASGIApp | None] | None


async def answer_or_raise(
    failure: Exception,
    on_commit_error: OnCommitError,
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    """Send the response that `on_commit_error` returns, or raise the error of the COMMIT.

    If the request will be retried, raise the error without calling `on_commit_error`.

    Call this function outside of an `except` block. Otherwise the traceback of the raised error
    would also show the internal exception AbortRequest.
    """
    # ConfigurationError, ForbiddenWrite and PrematureClose show a mistake in the application. A
    # response that the application's function `on_commit_error` makes would hide the mistake. So
    # raise these three errors without a call of `on_commit_error`.
    is_mistake = isinstance(failure, ConfigurationError | ForbiddenWrite | PrematureClose)
    will_retry = running_attempt.get().can_retry
    if on_commit_error is not None and not is_mistake and not will_retry:
        try:
            answer = on_commit_error(failure)
            if answer is not None:
                if not callable(answer):
                    wanted = "an ASGI application (such as a Starlette Response) or None"
                    raise wrong_result(answer, "on_commit_error", wanted)
                await answer(scope, receive, send)
                return
        except Exception as error:
            raise error from failure
    raise failure


def add_note(failure: Exception, error: BaseException) -> None:
    """If the application raised another exception after a failed COMMIT, name it in a note.

    The server gets only the error of the COMMIT. With the note, the log shows both errors.
    """
    if isinstance(error, AbortRequest) or error is failure:
        return
    if isinstance(error, BaseExceptionGroup) and error.split(AbortRequest)[1] is None:
        return
    failure.add_note(
        "While the application was stopped because of this error, it raised "
        f"{type(error).__name__}: {error}"
    )
