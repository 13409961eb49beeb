"""The class `Replicas`: the URLs of replicas, and where to store what each client has seen.

A client must not read older data from a replica than it has seen before. So this package stores up
to which position in the log (WAL) of the primary each client has seen the database.
"""

from collections.abc import Sequence
from typing import Protocol

from sqlalchemy import URL

from asgi_dbsession.types import Scope


class PositionStore(Protocol):
    """Stores the WAL position of each client, for example in Redis instead of a cookie.

    A WAL position says how far the primary has written its log. The position of a client is the
    highest position up to which the client has seen the primary. A replica that has reached the
    position of a client has all changes that the client has seen. The methods get the ASGI scope to
    identify the client.
    """

    async def load(self, scope: Scope) -> str | None:
        """Return the WAL position that is saved for the client. None if none is saved."""

    async def save(self, scope: Scope, position: str) -> None:
        """Save the WAL position up to which the client has seen the changes of the primary.

        If a greater string is saved for this client already, do not replace it. Otherwise the
        client could read older data than it has seen. The store is allowed to delete a position
        `lifetime` seconds (an attribute of `Replicas`) after it was saved.

        Args:
            scope: The ASGI scope of the request.
            position: The position as a string of at most 60 ASCII characters.
        """


class Replicas:
    """The replicas of a database, and where to store the WAL position of each client.

    The WAL position of a client says which changes of the primary the client has seen.

    Args:
        urls: One URL for each replica, and not the URL of a load balancer. If a URL names no
            driver, the driver of the primary is used.
        max_lag: How many seconds a replica may be behind the primary. A replica that is further
            behind is not used.
        cookie: The name of the cookie in which the WAL position of a client is stored.
        path: The URL path for which browsers send this cookie.
        store: An object that stores the positions instead of the cookie. None to use the cookie.

    Attributes:
        lifetime: For how many seconds the position of a client is stored: four times `max_lag`.

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
        from asgi_dbsession.replicas.checks import check_replicas

        check_replicas(urls, max_lag, cookie, path, store)
        self.urls: tuple[str | URL, ...] = tuple(urls)
        self.max_lag: float = max_lag
        self.cookie: str = cookie
        self.path: str = path
        self.store: PositionStore | None = store
        self.lifetime: int = int(4 * max_lag)
