"""Serves a request whose response may be withheld (not sent), because another response follows."""

from abc import ABC, abstractmethod

from asgi_dbsession.errors import ABORTED, AbortRequest
from asgi_dbsession.types import ASGIApp, Message, Receive, Scope, Send


class Withholding(ABC):
    """One attempt to serve a request; its response or error may be withheld (not sent, not raised).

    Attributes:
        is_answered: True if a message of a response was sent to the client.
        is_withheld: True if a response or an error was withheld.
    """

    def __init__(self) -> None:
        self.is_answered: bool = False
        self.is_withheld: bool = False

    async def serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request; do not send a withheld response, do not raise a withheld error."""

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
        """Return True to withhold (not send) `message`, the first message of a response."""

    @abstractmethod
    def withholds_error(self, error: BaseException) -> bool:
        """Return True to withhold (not raise) the exception that the application raised."""
