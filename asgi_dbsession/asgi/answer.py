"""Answers a request whose COMMIT failed: sends a response, or raises the original exception."""

from collections.abc import Callable, Coroutine

from asgi_dbsession.errors import AbortRequest, ConfigurationError, ForbiddenWrite
from asgi_dbsession.types import ASGIApp, Receive, Scope, Send


async def serve_and_answer(
    serve: ASGIApp,
    on_commit_error: Callable[[Exception], ASGIApp | None] | None,
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    """Serve a request, and send an error response or raise the error if its COMMIT failed."""
    try:
        await serve(scope, receive, send)
    except AbortRequest as abort:
        failure = abort.failure
    else:
        return
    await answer_or_raise(failure, on_commit_error, scope, receive, send)


async def answer_or_raise(
    failure: Exception | None,
    on_commit_error: Callable[[Exception], ASGIApp | None] | None,
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    """Send the response of `on_commit_error`, or raise the error of the COMMIT.

    Call this function outside of an `except` block, so that the traceback shows no AbortRequest.
    """
    # There is no error of a COMMIT, so an outer middleware has stopped the request, and that
    # middleware answers it.
    if failure is None:
        raise AbortRequest
    answer: ASGIApp | None = None
    # mistakes of the application, which must not be hidden
    is_mistake = isinstance(failure, ConfigurationError | ForbiddenWrite)
    if on_commit_error is not None and not is_mistake:
        try:
            answer = on_commit_error(failure)
            if answer is not None:
                await answer(scope, receive, send)
        except Exception as error:
            raise error from failure
    if answer is None:
        raise failure


def add_note(failure: Exception, error: BaseException) -> None:
    """Add a note to `failure` about an exception that the application raised when stopped."""
    if isinstance(error, AbortRequest) or error is failure:
        return
    if isinstance(error, BaseExceptionGroup) and error.split(AbortRequest)[1] is None:
        return
    failure.add_note(
        "While the application was stopped because of this error, it raised "
        f"{type(error).__name__}: {error}"
    )


def checked(decision: object, rule: str) -> bool:
    """Return the result of a function of the application that must return True or False.

    Raises:
        ConfigurationError: `decision` is neither True nor False.
    """
    if decision is True or decision is False:
        return decision
    if isinstance(decision, Coroutine):
        # Close the coroutine, because Python warns about a coroutine that nobody awaits.
        decision.close()
    raise ConfigurationError(
        f"{rule} must return True or False, and returned something of type "
        f"{type(decision).__name__}. Write a plain function, which is not awaited."
    )
