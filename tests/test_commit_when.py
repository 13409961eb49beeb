"""`commit_when` decides by the status, or by the status and the request."""

import sys
from functools import partial
from typing import Any

import pytest
from asgi import get, respond
from conftest import Running

from asgi_dbsession import ConfigurationError, DBSessionMiddleware

pytestmark = pytest.mark.anyio

KINDS = ("sqlite", "psycopg-sync")


def below_500(status: int) -> bool:
    return status < 500


def unless_preview(status: int, scope: Any) -> bool:
    return status < 400 and scope["path"] != "/preview"


def with_default(status: int, limit: int = 300) -> bool:
    return status < limit


def with_optional_scope(status: int, scope: Any = None) -> bool:
    return unless_preview(status, scope)


def with_limit(limit: int, status: int, scope: Any) -> bool:
    return status < limit and scope["path"] != "/preview"


class Rule:
    def __call__(self, status: int, scope: Any) -> bool:
        return unless_preview(status, scope)

    def method(self, status: int) -> bool:
        return status < 400


def annotated_for_type_checkers() -> Any:
    """Make a rule with an annotation that no name stands for while the program runs."""
    # Python 3.14 evaluates an annotation when it is asked for, and older ones at once.
    annotation = "Scope" if sys.version_info >= (3, 14) else "'Scope'"
    names: dict[str, Any] = {}
    exec(f"def rule(status, scope: {annotation}): return scope['path'] != '/preview'", names)
    return names["rule"]


RULES: list[tuple[Any, list[str]]] = [
    (below_500, ["/", "/404", "/preview"]),
    (unless_preview, ["/"]),
    (with_default, ["/", "/preview"]),
    (with_optional_scope, ["/"]),
    (partial(with_limit, 500), ["/", "/404"]),
    (Rule(), ["/"]),
    (Rule().method, ["/", "/preview"]),
    (lambda *args: len(args) == 1, ["/", "/404", "/preview"]),
    (annotated_for_type_checkers(), ["/", "/404"]),
    ((400).__gt__, ["/", "/preview"]),
]


@pytest.mark.parametrize(("rule", "stored"), RULES)
async def test_a_rule_is_called_as_its_signature_says(
    running: Running, rule: Any, stored: list[str]
) -> None:
    """The rule gets the status, or the status and the scope; it may have defaults."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await running.write(scope["path"])
        await respond(send, 404 if scope["path"] == "/404" else 200)

    middleware = DBSessionMiddleware(app, running.database, commit_when=rule)
    for path in ("/", "/404", "/preview"):
        exchange = await get(middleware, path)
        assert exchange.error is None
    assert running.stored() == stored


def nothing() -> bool:
    return True


def too_much(status: int, scope: Any, more: Any) -> bool:
    return True


def by_keyword(status: int, *, request: Any) -> bool:
    return True


@pytest.mark.parametrize("rule", [nothing, too_much, by_keyword])
def test_a_rule_of_anything_else_is_refused_at_once(rule: Any) -> None:
    """The error is raised when the middleware is made, not at the first response."""
    with pytest.raises(ConfigurationError, match=r"`def commit_when\(status, scope\)`"):
        DBSessionMiddleware(lambda *_: respond(None), "sqlite://", commit_when=rule)
