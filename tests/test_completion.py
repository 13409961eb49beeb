"""Tests that `run_to_completion` completes, for any cancellation at any point."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from contextvars import Context
from typing import Any

import anyio
import pytest

from asgi_dbsession.session.completion import run_to_completion

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """`test_trio.py` has the tests on trio."""
    return "asyncio"


class Work:
    """Waits for three futures, and records their results.

    Args:
        wait: How it waits for each.
    """

    def __init__(self, wait: Callable[[asyncio.Future[str]], Awaitable[str]]) -> None:
        loop = asyncio.get_running_loop()
        self.futures: list[asyncio.Future[str]] = [loop.create_future() for _ in range(3)]
        self.got: list[str] = []
        self._wait = wait

    async def run(self) -> str:
        """Return the work to run."""
        for future in self.futures:
            self.got.append(await self._wait(future))
        return "done"

    async def answer(self) -> None:
        """Complete one future after the other, each some loop iterations later."""
        for number, future in enumerate(self.futures):
            for _ in range(5):
                await asyncio.sleep(0)
            future.set_result(str(number))


async def directly(future: asyncio.Future[str]) -> str:
    return await future


async def with_a_time_limit(future: asyncio.Future[str]) -> str:
    async with asyncio.timeout(60):
        return await future


async def after_a_turn_of_the_loop(future: asyncio.Future[str]) -> str:
    await asyncio.sleep(0)
    return await future


async def within_another(future: asyncio.Future[str]) -> str:
    return await run_to_completion(directly(future))


WAITS = (directly, with_a_time_limit, after_a_turn_of_the_loop, within_another)


@pytest.fixture(params=WAITS, ids=lambda wait: wait.__name__)
async def work(request: pytest.FixtureRequest) -> Work:
    """Each way of waiting."""
    return Work(request.param)


async def test_it_returns_and_raises_what_the_work_does(work: Work) -> None:
    """The result and the exception are the same as with `await`."""

    async def fail() -> None:
        await asyncio.sleep(0)
        raise LookupError("of its own")

    answering = asyncio.create_task(work.answer())
    assert await run_to_completion(work.run()) == "done"
    assert work.got == ["0", "1", "2"]
    await answering
    with pytest.raises(LookupError, match="of its own"):
        await run_to_completion(fail())


@pytest.mark.parametrize("times", [1, 2])
async def test_a_cancellation_from_outside_waits_for_the_end_wherever_it_comes(
    work: Work, times: int
) -> None:
    """The caller is cancelled in any loop iteration; the cancellation is raised afterwards."""
    at, was_cancelled = -1, True
    while was_cancelled:
        at += 1
        each = Work(work._wait)
        task = asyncio.create_task(run_to_completion(each.run()))
        answering = asyncio.create_task(each.answer())
        for _ in range(at + 1):
            await asyncio.sleep(0)
        for _ in range(times):
            was_cancelled = task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        assert each.got == ["0", "1", "2"]
        assert isinstance(outcome, asyncio.CancelledError) == was_cancelled
        await answering
    assert at > 15


async def test_a_cancellation_that_was_there_before_waits_too(work: Work) -> None:
    """The work may cancel its own task."""
    answering = asyncio.create_task(work.answer())

    async def cancel_and_run() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel("before")
        await run_to_completion(work.run())

    with pytest.raises(asyncio.CancelledError, match="before"):
        await asyncio.create_task(cancel_and_run())
    assert work.got == ["0", "1", "2"]
    await answering


async def test_the_scope_that_was_cancelled_is_left_as_usual(work: Work) -> None:
    """The scope of the caller is cancelled, but the work is done before the scope ends."""
    answering = asyncio.create_task(work.answer())
    with anyio.CancelScope() as scope:
        asyncio.get_running_loop().call_soon(scope.cancel, context=Context())
        await run_to_completion(work.run())
        pytest.fail("it was cancelled")
    assert scope.cancelled_caught
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    assert work.got == ["0", "1", "2"]
    await answering


def test_a_cancelled_scope_does_not_keep_the_loop_busy() -> None:
    """The scope cancels again in every loop iteration while a task in it still runs."""

    class Counting(asyncio.SelectorEventLoop):
        turns = 0

        def _run_once(self) -> None:
            self.turns += 1
            super()._run_once()  # type: ignore[misc]

    async def wait() -> int:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Counting)
        with anyio.CancelScope() as scope:
            loop.call_soon(scope.cancel, context=Context())
            await run_to_completion(asyncio.sleep(0.1))
        assert scope.cancelled_caught
        return loop.turns

    with asyncio.Runner(loop_factory=Counting) as runner:
        assert runner.run(wait()) < 30


@pytest.mark.parametrize("is_cancelled", [False, True], ids=["alone", "cancelled meanwhile"])
@pytest.mark.parametrize("is_nested", [False, True], ids=["outermost", "nested"])
async def test_a_time_limit_of_the_work_reaches_it(is_cancelled: bool, is_nested: bool) -> None:
    """`asyncio.timeout` cancels the current task, which is the caller."""
    said: list[str] = []

    async def wait_in_vain() -> None:
        try:
            async with asyncio.timeout(0.05):
                await asyncio.get_running_loop().create_future()
        except TimeoutError:
            said.append("too late")

    async def nested() -> None:
        await run_to_completion(wait_in_vain())

    task = asyncio.create_task(run_to_completion(nested() if is_nested else wait_in_vain()))
    await asyncio.sleep(0)
    if is_cancelled:
        task.cancel()
    (outcome,) = await asyncio.gather(task, return_exceptions=True)
    assert said == ["too late"]
    assert isinstance(outcome, asyncio.CancelledError) == is_cancelled
    assert task.cancelling() == is_cancelled


async def test_a_time_limit_around_it_is_told_from_one_within() -> None:
    """The outer time limit raises `TimeoutError` after the work is done."""
    done: list[bool] = []

    async def work() -> None:
        await asyncio.sleep(0.05)
        done.append(True)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await run_to_completion(work())
    assert done == [True]
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_future_that_is_cancelled_itself_is_an_error_of_the_work() -> None:
    """A driver that loses its connection cancels the tasks that wait for it."""
    future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    seen: list[BaseException] = []

    async def wait() -> None:
        try:
            await future
        except asyncio.CancelledError as error:
            seen.append(error)
            raise

    task = asyncio.create_task(run_to_completion(wait()))
    await asyncio.sleep(0)
    future.cancel("lost")
    with pytest.raises(asyncio.CancelledError, match="lost"):
        await task
    assert len(seen) == 1


async def test_the_error_of_the_work_is_the_cause_of_the_cancellation() -> None:
    """Neither the cancellation nor the error is lost."""

    async def fail() -> Any:
        await asyncio.sleep(0.01)
        raise LookupError("of its own")

    task = asyncio.create_task(run_to_completion(fail()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as raised:
        await task
    assert isinstance(raised.value.__cause__, LookupError)


async def test_a_closing_loop_may_cancel_the_work_before_its_first_step() -> None:
    """It cancels all tasks. Then no coroutine stays that Python warns of."""
    others = asyncio.all_tasks()
    task = asyncio.create_task(run_to_completion(asyncio.sleep(0)))
    await asyncio.sleep(0)
    for each in asyncio.all_tasks() - others:
        each.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_interrupt_at_the_very_end_keeps_nobody_waiting() -> None:
    """A signal handler may raise its exception just before the caller is told of the end."""

    class Interrupted(BaseException):
        pass

    def interrupt(frame: Any, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_name == "finish":
            sys.settrace(None)
            raise Interrupted

    sys.settrace(interrupt)
    try:
        async with asyncio.timeout(10):
            with pytest.raises(Interrupted):
                await run_to_completion(asyncio.sleep(0))
    finally:
        sys.settrace(None)
