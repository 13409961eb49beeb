"""A block for `with` that is a decorator too, and refuses what it cannot decorate."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction
from types import TracebackType
from typing import Generic, ParamSpec, TypeVar

from asgi_dbsession.errors import ConfigurationError

S = TypeVar("S")
P = ParamSpec("P")
R = TypeVar("R")


class DecoratingBlock(Generic[S]):
    """What `SyncDatabase.begin()` returns.

    `contextlib.contextmanager` would decorate a coroutine function as well, and end the block
    before the function has run.

    Args:
        open_block: Makes a context manager for each use.
    """

    def __init__(self, open_block: Callable[[], AbstractContextManager[S]]) -> None:
        self._open_block = open_block
        self._blocks: list[AbstractContextManager[S]] = []

    def __enter__(self) -> S:
        block = self._open_block()
        session = block.__enter__()
        self._blocks.append(block)
        return session

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return self._blocks.pop().__exit__(exc_type, exc_value, traceback)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Run each call of a function in a block of its own.

        Raises:
            ConfigurationError: The function would run after the block has ended.
        """
        runs_later = (iscoroutinefunction, isgeneratorfunction, isasyncgenfunction)
        if any(kind(function) for kind in runs_later):
            raise ConfigurationError(
                f"`begin()` of a SyncDatabase cannot decorate "
                f"{getattr(function, '__qualname__', 'this function')}, which would run after the "
                "block has ended. Write `with database.begin():` inside of the function, or a "
                "function with `def` and `return`."
            )

        @wraps(function)
        def call_in_block(*args: P.args, **kwargs: P.kwargs) -> R:
            with self._open_block():
                return function(*args, **kwargs)

        return call_in_block
