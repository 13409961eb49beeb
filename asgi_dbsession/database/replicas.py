"""The option `replicas` of a database: its replicas, and where client positions are stored."""

import re
from collections.abc import Sequence
from typing import Protocol

from sqlalchemy import URL

from asgi_dbsession.errors import ConfigurationError
from asgi_dbsession.types import Scope

# the characters that a cookie's name may have: RFC 6265, 4.1.1
_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_PATH = re.compile(r"/[^;\s\x00-\x1f\x7f]*")


class PositionStore(Protocol):
    """Stores the WAL position that each client has seen, for example in Redis, instead of a cookie.

    The methods find the client of a request in the ASGI scope.
    """

    async def load(self, scope: Scope) -> str | None:
        """Return the text that was saved last for the client; None without a stored text."""

    async def save(self, scope: Scope, position: str) -> None:
        """Store the position that the client has seen, unless the text stored before is greater.

        Args:
            scope: The ASGI scope of the request.
            position: The position as text, at most 60 ASCII characters. The store may delete the
                text after `lifetime` seconds; see `Replicas`.
        """


class Replicas:
    """The replicas of a database, and where the WAL position that a client has seen is stored.

    Args:
        urls: One URL for each replica, not one URL of a load balancer. A URL without a driver gets
            the driver of the primary.
        max_lag: How many seconds a replica may be behind the primary. No unit of work reads from a
            replica that is further behind.
        cookie: The name of the cookie for the position of a client.
        path: The path of the cookie.
        store: An object that stores the positions of clients; None to use the cookie.

    Attributes:
        lifetime: Seconds for which the position of a client is stored: four times `max_lag`.

    Raises:
        ConfigurationError: An argument is wrong.
    """

    def __init__(
        self,
        urls: Sequence[str | URL],
        *,
        max_lag: float = 15,
        cookie: str = "db_position",
        path: str = "/",
        store: PositionStore | None = None,
    ) -> None:
        if isinstance(urls, str | URL) or not isinstance(urls, Sequence):
            raise ConfigurationError(
                "replicas takes a list of URLs, even of one: `replicas=[url]`."
            )
        if isinstance(max_lag, bool) or not isinstance(max_lag, int | float) or not max_lag >= 1:
            raise ConfigurationError("max_lag takes a number of seconds, 1 or more.")
        if not isinstance(cookie, str) or not _NAME.fullmatch(cookie):
            raise ConfigurationError(
                "cookie takes the name of a cookie: letters, digits, `_` and `-`."
            )
        if not isinstance(path, str) or not _PATH.fullmatch(path):
            raise ConfigurationError("path takes the path of a cookie, such as `/`.")
        self.urls: tuple[str | URL, ...] = tuple(urls)
        self.max_lag: float = max_lag
        self.cookie: str = cookie
        self.path: str = path
        self.store: PositionStore | None = store
        self.lifetime: int = int(4 * max_lag)
