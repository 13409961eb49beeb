"""Session classes that report the engine of each statement before the statement is sent."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from .guard import derive

S = TypeVar("S", bound=Session)


def telling_class(guarded: type[S]) -> type[S]:
    """Derive a session class that calls `Companion.bind_asked` with an engine before it is used."""
    return derive(guarded, (guarded,), {"get_bind": _telling(guarded.get_bind)})


def _telling(get_bind: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(get_bind)
    def get_bind_and_tell(self: Any, *args: Any, **kwargs: Any) -> Any:
        bind = get_bind(self, *args, **kwargs)
        if self._companion.bind_asked is not None:
            self._companion.bind_asked(bind)
        return bind

    return get_bind_and_tell
