"""The object that `SyncDatabase.begin()` returns: a context manager and a decorator."""

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
    """A context manager for `with` that is also a decorator of plain functions.

    The decorator of `contextlib.contextmanager` would accept a coroutine function too, and would
    end the block before the coroutine runs.

    Args:
        open_block: A function that returns a new context manager for each use.
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
        """Decorate a function, so that each call of the function runs in a new block.

        Raises:
            ConfigurationError: The function is a coroutine function or generator, which would run
                after the block has ended.
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
