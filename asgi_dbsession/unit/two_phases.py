"""The methods by which a unit of work commits its sessions in two phases."""

from typing import Any, Protocol, TypeVar

from asgi_dbsession.session.end import End
from asgi_dbsession.session.managed import ManagedSession, Sessions

S = TypeVar("S")


class TwoPhaseCommit(Protocol):
    """The methods of the class `TwoPhases` (in the package `two_phases`) of a unit of work."""

    def anew(self, databases: int) -> "TwoPhaseCommit":
        """Return an object for another unit of work, which has `databases` databases."""
        ...

    def manage(self, opened: ManagedSession[S]) -> ManagedSession[S]:
        """Return the session to use in the place of `opened`, which was opened just now."""
        ...

    async def commit(self, unit: Any, sessions: Sessions, end: End) -> BaseException | None:
        """Commit the sessions, and return the first error, or None."""
