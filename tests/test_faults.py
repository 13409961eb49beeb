"""Tests the promises during faults: the short form of `python -m benchmarks.faults`."""

import asyncio
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from asgi import get, respond
from replicas import cluster as replicated
from sqlalchemy import text

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware
from asgi_dbsession.types import Receive, Scope, Send
from benchmarks.faults.check import CASES
from benchmarks.faults.cluster import Cluster
from benchmarks.faults.failover import fail_over
from benchmarks.faults.ledger import (
    SCHEMA,
    Finding,
    Ledger,
    begin_anew,
    compare,
    open_transactions,
)
from benchmarks.faults.plan import CALM, FAULTS, faults_in_order, next_request
from benchmarks.faults.proxy import AFTER, BEFORE, Proxy
from benchmarks.faults.replicas_report import HEADING as REPLICAS, section
from benchmarks.faults.report import appendix
from benchmarks.faults.routers import ROUTERS
from benchmarks.faults.run import Result, run_tool
from benchmarks.faults.sections import kept_section, replace_section
from benchmarks.faults.soak import soak
from benchmarks.faults.soak_report import HEADING, soaked
from benchmarks.faults.stale_reads import prepare, watch

pytestmark = pytest.mark.timeout(180)

SEED = 7
PAGES = Path(__file__).parents[1] / "docs" / "explanation"
DOCUMENTED = PAGES / "what-cannot-be-promised.md"
FINE = Finding(lost=0, twice=0, phantom=0, half=0, money=0, open_stored=0)
# The statuses that show a fault to the clients.
REFUSED = {
    "the handler refuses",
    "the handler fails",
    "a swallowed error aborts the transaction",
    "COMMIT fails",
    "the pool is exhausted",
}
LEFT_OPEN = {
    "clients vanish at random",
    "clients vanish at chosen points",
    "requests are cancelled",
    "backends are terminated",
    "the database is stopped hard",
    "connections are cut in COMMIT",
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A separate server, because the test kills it."""
    cluster = Cluster()
    try:
        cluster.start()
        asyncio.run(cluster.query(SCHEMA))
        yield cluster
    finally:
        cluster.remove()


@pytest.fixture(scope="module")
def results(cluster: Cluster) -> dict[str, Result]:
    """Run this package through the whole plan once."""
    ran = run_tool("asgi_dbsession", faults_in_order(SEED), seed=SEED, seconds=0.5, cluster=cluster)
    return {result.fault: result for result in asyncio.run(ran)}


@pytest.mark.parametrize("fault", [fault.name for fault in (CALM, *FAULTS)])
def test_nothing_is_lost_and_nothing_leaks_although(results: dict[str, Result], fault: str) -> None:
    """Acknowledged work is stored once, refused work is not stored, and the system recovers."""
    result = results[fault]
    assert result.complaints == []
    assert result.ledger.acknowledged
    if fault in REFUSED:
        assert result.ledger.refused
    if fault in LEFT_OPEN:
        assert result.ledger.open
    if fault == CALM.name:
        assert not result.ledger.refused | result.ledger.open


def test_the_appendix_has_every_count(results: dict[str, Result]) -> None:
    """The recorded page has the text and the columns of a page that is written now."""
    kept = (PAGES / "under-faults-in-detail.md").read_text()
    (command,) = re.findall(r"Made by `(.*?)`", kept)
    written = appendix(command, {"asgi_dbsession": list(results.values())})
    *lines, _ = written.partition("| no fault |")[0].splitlines()
    assert kept.splitlines()[: len(lines)] == lines
    for fault in results:
        assert kept.count(f"\n| {fault} |") == kept.count("\n## ")
        assert written.count(f"\n| {fault} |") == 1


def test_a_soak_goes_on_until_enough_was_written_and_looks_at_one_process(
    cluster: Cluster, tmp_path: Path
) -> None:
    """One worker lives from the first to the last fault, and the document shows its counts."""
    ran = soak("psycopg", cluster, seed=SEED, seconds=0.2, writes=200, faults=20)
    soaked_here = asyncio.run(ran)
    whole = soaked_here.whole
    assert whole.complaints == []
    assert len(whole.ledger.acknowledged) >= 200
    assert whole.faults >= 20
    assert soaked_here.results[0].fault == CALM.name
    first, *_, last = soaked_here.usage
    assert (first.pid, first.tasks) == (last.pid, last.tasks)
    assert 0 < first.acknowledged < last.acknowledged == len(whole.ledger.acknowledged)
    assert 0 < last.connections <= 8

    written = soaked("COMMAND", [soaked_here])
    assert "**0 lost, 0 stored twice, 0 phantom, 0 half, 0 leaked.** Made by `COMMAND`." in written
    document = tmp_path / "document.md"
    assert "Not run yet" in kept_section(document, HEADING)
    document.write_text("before\n\n")
    for _ in range(2):
        replace_section(document, written)
        assert document.read_text() == f"before\n\n{written.rstrip()}\n"
    assert kept_section(document, HEADING) == written.rstrip()


def test_stale_reads_are_counted_and_written_into_a_section(tmp_path: Path) -> None:
    """A router that always reads from a replica shows old numbers; this package shows none."""
    fault = "both replicas 1 s behind"
    prepare(replicated())
    found = [
        asyncio.run(watch(replicated(), make, fault, 1.5)) for make in (ROUTERS[0], ROUTERS[-1])
    ]
    replicated().lag(0)
    own, naive = found
    assert min(own.reads, own.writes, naive.reads, naive.stale) > 0
    assert (own.stale, own.back, own.failed) == (0, 0, 0)
    written = section("COMMAND", 1.5, found)
    assert f"**0 stale reads and 0 steps back in {own.reads:,} reads" in written
    document = tmp_path / "document.md"
    document.write_text(f"before\n\n{REPLICAS}\n\nold\n\n## After\n\ntext\n")
    for _ in range(2):
        replace_section(document, written)
        assert document.read_text() == f"before\n\n{written.rstrip()}\n\n## After\n\ntext\n"
    assert kept_section(document, REPLICAS) == written.rstrip()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_no_acknowledged_write_is_lost_when_a_standby_takes_over(driver: str) -> None:
    """The URL names both hosts, and the application connects to the new primary."""
    failover = asyncio.run(fail_over("asgi_dbsession", driver, seconds=0.5))
    assert failover.gap is not None
    assert 0 < failover.before < len(failover.ledger.acknowledged)
    assert (failover.finding.lost, failover.finding.half) == (0, 0)


def test_without_server_and_other_clients_it_is_the_same(cluster: Cluster) -> None:
    """Send one request after the other in a separate process."""
    asyncio.run(begin_anew(cluster))
    command = [sys.executable, "-m", "benchmarks.faults.check"]
    ran = subprocess.run(
        [*command, "asgi_dbsession", cluster.url("asyncpg")], capture_output=True, check=True
    )
    assert json.loads(ran.stdout) == dict.fromkeys(CASES, "")


def test_the_plan_finds_what_a_commit_after_the_response_loses(cluster: Cluster) -> None:
    """The check must find errors: this is a common mistake with FastAPI's `Depends`."""
    faults = [fault for fault in FAULTS if fault.name == "COMMIT fails"]
    ran = run_tool("depends_commit", faults, seed=SEED, seconds=0.3, cluster=cluster)
    (result,) = asyncio.run(ran)
    assert result.finding.lost > 0
    assert result.complaints == [f"{result.finding.lost} lost"]


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize(("cut", "stored"), [(BEFORE, 0), (AFTER, 1), (None, 1)])
def test_a_connection_that_dies_in_commit_can_be_told_from_a_refusal(
    cluster: Cluster, driver: str, cut: str | None, stored: int
) -> None:
    """The result is as documented, for each result in the database."""
    documented: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", DOCUMENTED.read_text(), re.DOTALL)[0], documented)

    async def commit_through_proxy() -> tuple[int | None, int]:
        await begin_anew(cluster)
        proxy = Proxy(cluster.port)
        database = AsyncDatabase(cluster.url(driver, await proxy.start()))

        async def write(scope: Scope, receive: Receive, send: Send) -> None:
            await database.get_session().execute(text("INSERT INTO entry VALUES (1)"))
            await respond(send, 201)

        app = DBSessionMiddleware(
            write, database, on_commit_error=documented["answer_failed_commit"]
        )
        async with database:
            proxy.cut = lambda: cut
            exchange = await get(app, method="POST")
            proxy.cut = lambda: None
            checked_out: Any = database.engine.pool
            assert checked_out.checkedout() == 0
        proxy.stop()
        ((count,),) = await cluster.query("SELECT count(*) FROM entry")
        return exchange.status, count

    assert asyncio.run(commit_through_proxy()) == (500 if cut else 201, stored)


@pytest.mark.parametrize(
    ("tamper", "found"),
    [
        ("SELECT 1", FINE),
        ("DELETE FROM entry WHERE number = 1; DELETE FROM line WHERE number = 1", {"lost": 1}),
        ("INSERT INTO entry VALUES (1); INSERT INTO line VALUES (1)", {"twice": 1}),
        ("INSERT INTO entry VALUES (2); INSERT INTO line VALUES (2)", {"phantom": 1}),
        ("INSERT INTO entry VALUES (3); INSERT INTO line VALUES (3)", {"open_stored": 1}),
        ("DELETE FROM line WHERE number = 1", {"half": 1}),
        ("INSERT INTO transfer VALUES (4, 1, 2, 5)", {"half": 2}),
        ("UPDATE account SET balance = balance + 1 WHERE id = 1", {"half": 1, "money": 1}),
    ],
)
def test_the_reader_notices(cluster: Cluster, tamper: str, found: Finding | dict[str, int]) -> None:
    """Tests each way in which the database can disagree with the answers of the clients."""

    async def read() -> Finding:
        await begin_anew(cluster)
        ledger = Ledger()
        for number, status in enumerate((201, 409, None), 1):
            ledger.note(number, status, errors_leave_open=False)
        await cluster.query("INSERT INTO entry VALUES (1); INSERT INTO line VALUES (1)")
        await cluster.query(tamper)
        return await compare(ledger, cluster)

    expected = found if isinstance(found, Finding) else Finding(**{**vars(FINE), **found})
    assert asyncio.run(read()) == expected


def test_an_error_is_a_promise_unless_the_connection_may_have_died() -> None:
    """A 409 means that nothing was stored; a 500 is open only while connections are cut."""
    ledger = Ledger()
    for number, (status, errors_leave_open) in enumerate(
        [(500, False), (500, True), (409, True), (None, False), (0, True)]
    ):
        ledger.note(number, status, errors_leave_open=errors_leave_open)
    assert (ledger.acknowledged, ledger.refused, ledger.open) == (set(), {0, 2}, {1, 3})


def test_a_transaction_that_is_left_open_is_seen(cluster: Cluster) -> None:
    """A worker without requests is checked too."""

    async def look() -> tuple[int, int]:
        waiting = asyncio.create_task(cluster.query("SELECT pg_sleep(0.5)"))
        while not (during := await open_transactions(cluster)) and not waiting.done():
            await asyncio.sleep(0.01)
        await waiting
        return during, await open_transactions(cluster)

    assert asyncio.run(look()) == (1, 0)


@pytest.mark.parametrize(
    "of_seed",
    [
        lambda seed: [each.name for each in itertools.islice(faults_in_order(seed), 10)],
        lambda seed: [next_request(FAULTS[-1], number, Random(seed)) for number in range(10)],
    ],
    ids=["faults", "requests"],
)
def test_all_chance_follows_from_the_seed(of_seed: Callable[[int], list[object]]) -> None:
    """The same seed gives the same plan, so that a failure can be repeated."""
    assert of_seed(1) == of_seed(1)
    assert of_seed(1) != of_seed(2)
