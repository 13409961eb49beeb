"""The objects that `begin()` returns, for `with` or `async with`, and as a decorator."""

from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AbstractContextManager, ExitStack
from functools import wraps
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction, unwrap
from threading import Lock
from typing import Any, Generic, ParamSpec, TypeVar

from asgi_dbsession.errors import ConfigurationError, name_of

S = TypeVar("S")
P = ParamSpec("P")
R = TypeVar("R")


class DecoratingBlock(Generic[S]):
    """A context manager for `with`, which can also decorate plain functions.

    Python's `contextlib.contextmanager` makes a decorator too. But that decorator accepts coroutine
    functions, and would end the `with` block before the coroutine runs.

    Args:
        open_block: A function that returns a new context manager each time.
    """

    def __init__(self, open_block: Callable[[], AbstractContextManager[S]]) -> None:
        self._open_block = open_block
        self._open: Any = ExitStack()
        self._is_free: Lock = Lock()

    def __enter__(self) -> S:
        # This object can store only one open block. If two threads were in its `with` block at
        # once, one thread could commit or roll back the work of the other one.
        if not self._is_free.acquire(blocking=False):
            raise ConfigurationError(
                "This `begin()` block is open already, perhaps in another thread. Write "
                "`with database.begin():` at each place."
            )
        with ExitStack() as stack:
            stack.callback(self._is_free.release)
            session = stack.enter_context(self._open_block())
            self._open = stack.pop_all()
        return session

    def __exit__(self, *raised: object) -> bool | None:
        is_handled: bool | None = self._open.__exit__(*raised)
        return is_handled

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate a function, so that each call of it runs in a new `with database.begin()` block.

        Raises:
            ConfigurationError: The function is a coroutine function or a generator. Its code would
                run after the block has ended.
        """
        runs_later = (iscoroutinefunction, isgeneratorfunction, isasyncgenfunction)
        if any(kind(function) for kind in runs_later):
            raise ConfigurationError(
                f"`begin()` of a SyncDatabase cannot decorate {name_of(function)}, which would run "
                "after the block has ended. Write `with database.begin():` inside of the function, "
                "or a function with `def` and `return`."
            )

        @wraps(function)
        def call_in_block(*args: P.args, **kwargs: P.kwargs) -> R:
            with self._open_block():
                return function(*args, **kwargs)

        return call_in_block


class AsyncDecoratingBlock(AbstractAsyncContextManager[S, bool | None]):
    """A context manager for `async with`, which can also decorate coroutine functions.

    Args:
        open_block: A function that returns a new context manager each time.
    """

    def __init__(self, open_block: Callable[[], AbstractAsyncContextManager[S]]) -> None:
        self._open_block = open_block
        self._block: Any = open_block()

    async def __aenter__(self) -> S:
        session: S = await self._block.__aenter__()
        return session

    async def __aexit__(self, *raised: object) -> bool | None:
        is_handled: bool | None = await self._block.__aexit__(*raised)
        return is_handled

    def __call__(self, function: Callable[P, Awaitable[R]]) -> Callable[P, Coroutine[Any, Any, R]]:
        """Decorate a function, so that each call of it runs in a new `async with` block.

        Raises:
            ConfigurationError: The function is no coroutine function. A caller that does not await
                it would get no error, and its code would never run.
        """
        inner: Any = unwrap(function)
        if not (iscoroutinefunction(inner) or iscoroutinefunction(type(inner).__call__)):
            raise ConfigurationError(
                f"`begin()` of an AsyncDatabase cannot decorate {name_of(function)}, which is no "
                "coroutine function. Write the function with `async def` and await its calls, or "
                "use a SyncDatabase."
            )

        @wraps(function)
        async def call_in_block(*args: P.args, **kwargs: P.kwargs) -> R:
            async with self._open_block():
                return await function(*args, **kwargs)

        return call_in_block
