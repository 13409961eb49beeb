"""The option `replicas` of a database."""

import re
from collections.abc import Sequence
from typing import Protocol

from sqlalchemy import URL

from asgi_dbsession.errors import ConfigurationError
from asgi_dbsession.types import Scope

_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # RFC 6265, 4.1.1
_PATH = re.compile(r"/[^;\s\x00-\x1f\x7f]*")


class PositionStore(Protocol):
    """Keeps what each client has seen, in place of a cookie: in Redis, say.

    Which client a request is of is for the store to find out, from the ASGI scope.
    """

    async def load(self, scope: Scope) -> str | None:
        """What was saved last for the client; None if nothing was, or it has expired."""

    async def save(self, scope: Scope, position: str) -> None:
        """Keep what the client has seen, unless a greater text is there.

        Args:
            scope: The ASGI scope of the request.
            position: At most 50 ASCII characters. They may be forgotten after `lifetime` seconds.
        """


class Replicas:
    """The replicas of a database, and how the position of a client travels.

    Args:
        urls: One URL for each replica; not one for all of them, behind a load balancer. A URL that
            names no driver gets that of the primary.
        max_lag: Seconds. A replica that is further behind the primary is not read from.
        cookie: The name of the cookie with the position of a client.
        path: The path of the cookie.
        store: Keeps the positions of clients in place of the cookie.

    Attributes:
        lifetime: Seconds for which the position of a client is kept: four times `max_lag`.

    Raises:
        ConfigurationError: An argument is not what it should be.
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
