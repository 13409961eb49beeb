"""Whether BEGIN is delayed or not, any sequence of operations comes to the same.

Hypothesis makes up requests. Each runs twice against one PostgreSQL or MariaDB, beside a second
writer: with `autocommit_reads` and without. Many more:
`HYPOTHESIS_PROFILE=long python -m pytest -o timeout=0 -n 0 tests/test_reads_properties.py -s`.
"""

from collections import Counter
from collections.abc import Iterator
from functools import cache

import pytest
from hypothesis import example, given, settings
from made_up_requests import (
    CASES,
    KINDS,
    MAIN,
    OTHER,
    POSTGRESQL,
    SAME,
    Bench,
    Case,
    Outcome,
    Run,
    new_urls,
    opened_bench,
    steps,
)
from made_up_steps import COMMITTING
from sqlalchemy import URL

from asgi_dbsession.testing import rolled_back

# SQLAlchemy warns of objects that are added where only `rollback()` can follow; so it should.
pytestmark = pytest.mark.filterwarnings("ignore:Session's state has been changed on a non-active")

EXAMPLES = settings().max_examples


# PostgreSQL alone knows COPY and SET LOCAL.
ON_POSTGRESQL = (
    steps("all", "set local", "tenant", "commit", "tenant", "all"),
    steps("all", "copy", "copy a file", "all", "copy out", status=409),
    steps("all", "copy", "failing copy", "all"),
    steps("all", "2:all", "insert", "2:copy", "2:all", second=OTHER),
    steps("all", "insert", "2:copy", "all", second=SAME, two_phase=True),
)
ON_MARIADB = (
    steps("all", "insert", "create a table", "insert", "all", status=409),
    steps("all", "commit below", "raw", status=409),
    steps("all", "commit as text", "flush", status=409),
    steps("all", "procedure below", "all", status=409),
    steps("procedure", "commit", "procedure", "all", status=0),
    steps("all", "text", "all", read_only=True),
)


@cache
def urls_of(kind: str) -> dict[str, URL]:
    """The databases of one kind."""
    return new_urls(kind, "reads_properties")


@pytest.fixture(params=KINDS)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Each kind of database and driver."""
    kind = "asyncmy" if request.param not in POSTGRESQL else "asyncpg"
    with opened_bench(request.param, urls_of(kind)) as opened:
        yield opened


def features(case: Case) -> list[str]:
    """What is worth counting about a request."""
    has = {
        "COPY": any("copy" in each.do for each in case.steps),
        "two databases": bool(case.second) and len({each.on_second for each in case.steps}) > 1,
        "reports": case.has_reports,
        "two phases": case.two_phase and not case.read_only,
    }
    return [name for name, is_there in has.items() if is_there]


def test_no_application_can_tell(bench: Bench) -> None:
    """Results, classes of errors, the response, reports, and the rows stored after each step.

    Not even a report says that BEGIN was delayed: BEGIN is no statement, and a unit that only read
    is committed, although there is nothing to send.
    """
    counts: Counter[str] = Counter()
    delayed: Counter[str] = Counter()

    @settings(max_examples=EXAMPLES // 5)
    @given(case=bench.cases)
    @example(steps("all", "other inserts", "all", "insert", "other updates", "all"))
    @example(steps("all", "2:all", "insert", "2:insert", "all", "2:commit", second=SAME))
    @example(steps("all", "2:all", "2:insert", second=OTHER, two_phase=True))
    def compare(case: Case) -> None:
        outcomes = {}
        for wanted, databases in bench.databases.items():
            with bench.begun_anew() as writers:
                run = Run(case, databases, writers)
                outcomes[wanted] = bench.runner.run(run.outcome())
                # A request that may only read has nothing to prepare, so it has one phase.
                has_two_phases = case.two_phase and not case.read_only
                assert not run.was_delayed or (wanted and not has_two_phases)
                if run.was_delayed:
                    delayed.update(["all", *features(case)])
        counts.update(["all", *features(case)])
        assert outcomes[True] == outcomes[False]
        # After a COMMIT that SQLAlchemy does not know of, MariaDB accepts writes: the page says so.
        if case.read_only and not any(each.do in COMMITTING for each in case.steps):
            by_others = ("taken", "second", "third", "other")
            rows = [row for each in outcomes[True].stored[-1] for row in each]
            assert all(row[1].startswith(by_others) for row in rows)

    for each in ON_MARIADB if bench.is_mariadb else ON_POSTGRESQL:
        compare = example(each)(compare)
    compare()
    print(*(f"{each}: {delayed[each]} of {counts[each]} delayed;" for each in counts))  # noqa: T201
    assert delayed["all"] > counts["all"] // 4
    rare = ["two databases", "reports", *([] if bench.is_mariadb else ["COPY"])]
    assert min(delayed[each] for each in rare) > 3
    assert counts["two phases"] > 3


@pytest.mark.parametrize("bench", POSTGRESQL, indirect=True)
def test_nor_inside_of_rolled_back(bench: Bench) -> None:
    """There, all share one transaction, and nothing is delayed."""

    @settings(max_examples=EXAMPLES // 20)
    @given(case=CASES)
    def compare(case: Case) -> None:
        outcomes = {}
        for wanted, databases in bench.databases.items():
            with bench.begun_anew() as writers:
                writers[MAIN].exec_driver_sql("SET lock_timeout = '100ms'")
                run = Run(case, databases, writers)

                async def isolated(run: Run = run) -> Outcome:
                    async with rolled_back(*run.used):
                        return await run.outcome()

                outcomes[wanted] = bench.runner.run(isolated())
                assert not run.was_delayed
        assert outcomes[True] == outcomes[False]

    compare()
