"""Made-up requests, cancelled at each await: the same is stored, whether BEGIN is delayed or not.

Many more:
`HYPOTHESIS_PROFILE=long python -m pytest -o timeout=0 -n 0 tests/test_reads_cancelled.py -s`.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator
from contextvars import Context
from functools import cache
from typing import Any

import pytest
from conftest import becomes_true
from hypothesis import example, given, settings, strategies as st
from made_up_requests import (
    KINDS,
    OTHER,
    POSTGRESQL,
    SAME,
    Bench,
    Case,
    Run,
    new_urls,
    opened_bench,
    steps,
)
from sqlalchemy import URL
from test_cancellation import Awaits

pytestmark = [
    pytest.mark.filterwarnings("ignore:Session's state has been changed on a non-active"),
    pytest.mark.timeout(300),
]

EXAMPLES = settings().max_examples
WAYS = ("native", "native twice", "native from outside")


@cache
def urls_of(kind: str) -> dict[str, URL]:
    """The databases of one kind."""
    return new_urls(kind, "reads_cancelled")


@pytest.fixture(params=KINDS)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Each kind of database and driver."""
    kind = "asyncmy" if request.param not in POSTGRESQL else "asyncpg"
    with opened_bench(request.param, urls_of(kind)) as opened:
        yield opened


async def cancelled(run: Run, at: int, way: str) -> bool:
    """Cancel a request at its `at`-th await; return if it had so many."""
    for database in run.used:
        await database.ping()  # the connection exists, and its awaits do not count

    def cancel() -> None:
        task.cancel()

    def cancel_from_outside() -> None:
        asyncio.get_running_loop().call_soon(cancel, context=Context())

    act = cancel_from_outside if way.endswith("from outside") else cancel
    with Awaits(at, 2 if way == "native twice" else 1, act) as awaits:
        task = asyncio.get_running_loop().create_task(run.serve())
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
    reached = awaits.count >= at
    assert not isinstance(outcome, Exception), outcome
    run.look()
    run.assert_clean()
    # A closed connection takes a moment to end on the server.
    await becomes_true(lambda: run.open_transactions() == 0)
    return reached


def test_any_await_of_any_request(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """Stored is what was stored at one step of the whole request, and never a part of a step.

    All of it is stored if the client got its status.
    """
    counts: Counter[str] = Counter()
    last = "raw" if bench.is_mariadb else "copy"

    @settings(max_examples=max(EXAMPLES // 80, 1))
    @given(case=bench.cases, way=st.sampled_from(WAYS))
    @example(steps("connection"), "native from outside")  # while BEGIN is sent, below SQLAlchemy
    @example(steps("all", "insert", "all", last), "native")
    @example(steps("all", "insert", "commit", "all", "flush", last), "native from outside")
    @example(steps("all", "2:all", "flush", "2:insert", second=OTHER, two_phase=True), "native")
    @example(steps("all", "2:all", "insert", "2:all", second=SAME), "native twice")
    def compare(case: Case, way: str) -> None:
        if bench.is_asyncpg and any("copy out" in each.do for each in case.steps):
            # asyncpg can wait forever: test_cancellation.py has the test, and the cure.
            counts["left out"] += 1
            return
        seen = {wanted: stored_at_each(case, way, wanted) for wanted in bench.databases}
        assert seen[True] == seen[False]
        counts["requests"] += 1

    def stored_at_each(case: Case, way: str, wanted: bool) -> list[Any]:
        databases = bench.databases[wanted]
        with bench.begun_anew() as writers:
            run = Run(case, databases, writers)
            run.look()
            bench.runner.run(run.outcome())
            counts["delayed"] += run.was_delayed
        whole, seen = run, []
        at, reached = 0, True
        while reached:
            at += 1
            with bench.begun_anew() as writers:
                run = Run(case, databases, writers)
                reached = bench.runner.run(cancelled(run, at, way))
            if bench.is_mariadb:
                # With or without the option, SQLAlchemy sends ROLLBACK after a `commit()` of the
                # application. If this is cancelled, the pool closes the connection, and logs it.
                caplog.clear()
            # Not even the pool had to close a connection that could not be rolled back.
            assert not [each for each in caplog.records if each.levelno >= logging.ERROR], at
            last = run.stored[-1]
            assert last in whole.stored
            if run.exchange.status == 201:
                assert last == whole.stored[-1]
            if last not in seen:
                seen.append(last)
        assert seen[-1] == whole.stored[-1]
        counts["cancellations"] += at - 1
        return seen

    compare()
    print(dict(counts))  # noqa: T201
    assert counts["delayed"] > counts["requests"] // 4
    assert counts["cancellations"] > 10 * counts["requests"]
