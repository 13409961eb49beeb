"""Serves a request, and can hold back an error response, to retry or to send 503 instead."""

from abc import ABC, abstractmethod

from asgi_dbsession.errors import ABORTED, AbortRequest
from asgi_dbsession.types import ASGIApp, Message, Receive, Scope, Send


class Withholding(ABC):
    """One attempt to serve a request, which can hold back an error response or an exception.

    Attributes:
        is_answered: True if the client got a part of a response.
        is_withheld: True if a response or an exception was held back.
    """

    def __init__(self) -> None:
        self.is_answered: bool = False
        self.is_withheld: bool = False

    async def serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request, but hold back a response that will be replaced.

        Before a response starts or an exception is raised, the methods `withholds_message` and
        `withholds_error` of the subclass are asked. If they return True, the client gets nothing.
        Then the caller can retry the request, or send another response.
        """

        async def withhold_or_send(message: Message) -> None:
            if self.is_withheld or (not self.is_answered and self.withholds_message(message)):
                self.is_withheld = True
                raise AbortRequest
            self.is_answered = True
            await send(message)

        try:
            await app(scope, receive, withhold_or_send)
        except ABORTED as error:
            is_error = not self.is_answered and self.withholds_error(error)
            self.is_withheld = self.is_withheld or is_error
            if not self.is_withheld:
                raise

    @abstractmethod
    def withholds_message(self, message: Message) -> bool:
        """Return True to hold back a response, so that the client gets another response.

        For example, the request is retried after a conflict, or 503 is sent instead.

        Args:
            message: The first message of the response.
        """

    @abstractmethod
    def withholds_error(self, error: BaseException) -> bool:
        """Return True to catch an exception of the application instead of raising it.

        The caller must then give the client another response: from a retry, or with status 503.

        Args:
            error: The exception that the application has raised.
        """
