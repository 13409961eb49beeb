"""The promises that hold for every error of this package."""

import copy
import pickle

import pytest

from asgi_dbsession import (
    ConcurrentUse,
    ConfigurationError,
    DatabaseNotRunning,
    DatabaseUnavailable,
    DBSessionError,
    ForbiddenWrite,
    NoSession,
    PrematureClose,
    SessionClosed,
    SyncDatabase,
    TransactionAborted,
)
from asgi_dbsession.testing import NotIsolated

DATABASE = SyncDatabase("sqlite:///shop.db")
ERRORS = [
    ConcurrentUse(DATABASE),
    ConfigurationError("Write this."),
    DatabaseNotRunning(DATABASE),
    DatabaseNotRunning(DATABASE, other_loop=True),
    DatabaseUnavailable(DATABASE, "gone"),
    ForbiddenWrite(DATABASE, "a new Order"),
    NoSession(DATABASE),
    NotIsolated("sqlite:///shop.db", "It waited."),
    PrematureClose(DATABASE),
    SessionClosed(DATABASE),
    TransactionAborted(DATABASE, "lost"),
    TransactionAborted(DATABASE, "lost", rolled_back=True),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_is_the_same_in_another_process(error: DBSessionError) -> None:
    """Celery, pools and Sentry pickle or copy errors; class, text and notes stay the same."""
    error.add_note("in a worker")
    copies = [pickle.loads(pickle.dumps(error, protocol)) for protocol in range(6)]
    for each in (*copies, copy.copy(error)):
        assert type(each) is type(error)
        assert (str(each), each.args) == (str(error), error.args)
        assert each.__notes__ == ["in a worker"]


def test_every_error_is_tried() -> None:
    """Each error class is in the list above."""
    assert {type(each) for each in ERRORS} >= set(DBSessionError.__subclasses__())
