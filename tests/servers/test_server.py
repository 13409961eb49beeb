"""Tests the promises over a real socket under each server, and how each server stops."""

import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from conftest import becomes_true
from server import BARE, KINDS, Shop, open_shop
from sqlalchemy import URL

pytestmark = pytest.mark.anyio

DOCS = (Path(__file__).parents[2] / "docs/how-to/servers.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", DOCS, re.DOTALL | re.MULTILINE)
EVERY_SERVER = pytest.mark.parametrize("server", KINDS)


def row(test: Any) -> Any:
    """Test it under every server, as a row of the table."""
    return pytest.mark.matrix("Servers", "server")(EVERY_SERVER(test))


@pytest.fixture
def new_shop(server: str, tmp_path: Path) -> Iterator[Shop]:
    """A shop whose servers have still to be started."""
    shop = Shop(server, tmp_path, "servers")
    yield shop
    shop.close()


@pytest.fixture
def closed_port(new_shop: Shop) -> Iterator[URL]:
    """The URL of a database that refuses connections."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        yield URL.create(
            f"postgresql+{new_shop.kind.driver}" if new_shop.kind.driver else "postgresql",
            username="app",
            password="hush",
            host="127.0.0.1",
            port=closed.getsockname()[1],
            database="shop",
        )


@row
async def test_what_was_acknowledged_is_stored(server: str) -> None:
    """A write is committed before the response is sent."""
    shop = await open_shop(server)
    response = shop.server.post("lingering")
    assert shop.real.stored() == ["lingering"]
    assert (response.status_code, response.text) == (201, "stored")
    await shop.assert_clean()


@row
async def test_a_request_reads(server: str) -> None:
    """A request reads rows that other requests stored."""
    shop = await open_shop(server)
    assert shop.server.get().json() == []
    assert shop.server.post("one").status_code == 201
    assert shop.server.get().json() == ["one"]
    await shop.assert_clean()


@row
async def test_a_failed_commit_is_a_500(server: str) -> None:
    """After a failed COMMIT the client gets a 500, and nothing of the response."""
    shop = await open_shop(server)
    response = shop.server.post("doomed")
    assert response.status_code == 500
    assert "stored" not in response.text
    await becomes_true(lambda: "ForeignKeyViolation" in shop.server.printed)
    assert shop.real.stored() == []
    await shop.assert_clean()
    assert shop.server.post("fine").status_code == 201
    assert shop.real.stored() == ["fine"]


@row
async def test_an_exception_rolls_back(server: str) -> None:
    """After an unhandled exception the client gets a 500, and the work is rolled back."""
    shop = await open_shop(server)
    assert shop.server.post("broken").status_code == 500
    assert shop.real.stored() == []
    await becomes_true(lambda: "LookupError: broken" in shop.server.printed)
    await shop.assert_clean()


@row
async def test_a_client_that_hangs_up_in_a_stream_leaves_nothing_checked_out(server: str) -> None:
    """A client that disconnects during a stream leaks no connection."""
    shop = await open_shop(server)
    with httpx2.stream("GET", shop.server.url + "/stream", verify=False) as response:
        parts = response.iter_raw()  # kept, because its end is the end of the response
        assert next(parts).startswith(b"part")
        assert shop.server.status()["held"] == 1
    await shop.assert_clean()
    assert shop.real.stored() == []
    assert shop.server.post("fine").status_code == 201


@row
async def test_server_sent_events_hold_no_connection_while_they_wait(server: str) -> None:
    """Server-sent events start at once, and hold no connection between two events."""
    shop = await open_shop(server)
    with httpx2.stream("GET", shop.server.url + "/events", verify=False, timeout=10) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = response.iter_lines()
        assert next(lines) == ": listening"
        for number in range(3):
            shop.server.post(f"event {number}")
            await shop.assert_clean()
            shop.server.post(path="/notify")
            while not (line := next(lines)).startswith("data"):
                pass
            assert line.endswith(f"event {number}")
    await shop.assert_clean()


@row
async def test_a_server_that_is_stopped_leaves_no_connection(new_shop: Shop) -> None:
    """SIGTERM closes every connection and exits as usual."""
    server = await new_shop.start().serving()
    for number in range(4):
        assert server.post(f"row {number}").status_code == 201
    assert new_shop.real.connections() >= 1
    assert server.stop() == new_shop.kind.exit_status
    await becomes_true(lambda: new_shop.real.connections() == 0)
    assert "Traceback" not in server.printed
    assert len(new_shop.real.stored()) == 4
    if new_shop.kind.refusals:
        assert "connections left: 0" in server.printed


@row
async def test_two_workers_leave_no_connection(new_shop: Shop) -> None:
    """Two workers close every connection too."""
    if new_shop.kind.workers is None:
        pytest.skip("daphne runs one process, so its users start several")
    server = await new_shop.start("workers").serving()
    for number in range(8):
        assert server.post(f"row {number}").status_code == 201
    assert new_shop.real.connections() >= 2
    server.stop()
    await becomes_true(lambda: new_shop.real.connections() == 0)
    assert "Traceback" not in server.printed
    assert server.printed.count("connections left: 0") == 2
    assert len(new_shop.real.stored()) == 8


@row
async def test_a_server_that_is_stopped_in_the_middle_of_a_request_stores_it_first(
    new_shop: Shop,
) -> None:
    """After SIGTERM during a request, the work is stored and the client gets its response."""
    if not new_shop.kind.refusals:
        pytest.skip("daphne cancels running requests, which rolls them back")
    statuses: list[int] = []
    server = await new_shop.start().serving()
    request = threading.Thread(target=lambda: statuses.append(server.post("slow").status_code))
    request.start()
    await becomes_true(lambda: new_shop.real.open_transactions() == 1)
    server.stop()
    request.join()
    assert statuses == [201]
    assert new_shop.real.stored() == ["slow"]
    await becomes_true(lambda: new_shop.real.connections() == 0)


@row
async def test_a_server_that_reloads_leaves_no_connection_of_its_former_self(
    new_shop: Shop,
) -> None:
    """A reload closes every connection of the old code."""
    if new_shop.kind.reload is None:
        pytest.skip("daphne does not reload")
    server = await new_shop.start("reload").serving()
    assert server.post("before").status_code == 201
    former = server.pid()
    new_shop.file.write_text(new_shop.file.read_text() + "\n")
    await becomes_true(lambda: server.pid() not in (None, former), seconds=30)
    await becomes_true(lambda: new_shop.real.connections() <= 1)  # the process of the new code
    assert server.post("after").status_code == 201
    server.stop()
    await becomes_true(lambda: new_shop.real.connections() == 0)
    assert new_shop.real.stored() == ["before", "after"]


@row
async def test_a_server_without_its_database_exits_and_says_why(
    new_shop: Shop, closed_port: URL
) -> None:
    """If the database does not answer, the server does not start, and one line says why."""
    if not new_shop.kind.refusals:
        pytest.skip("daphne starts anyway: each request that needs the database gets a 500")
    server = new_shop.start(url=closed_port.render_as_string(hide_password=False))
    await becomes_true(lambda: server.process.poll() is not None, seconds=20)
    assert server.process.returncode in new_shop.kind.refusals
    assert "hush" not in server.printed
    address = f"{closed_port.host}:{closed_port.port}"
    line, *more = [each for each in server.printed.splitlines() if address in each]
    assert "are host, port, name, user and password right?" in line
    if new_shop.kind is not KINDS["granian"]:  # the traceback follows
        assert more == []


@EVERY_SERVER
async def test_a_server_that_is_given_no_url_exits_and_says_why(new_shop: Shop) -> None:
    """The startup also fails if the framework makes its middleware during the lifespan."""
    if not new_shop.kind.refusals:
        pytest.skip("daphne starts anyway: each request gets a 500")
    new_shop.file.write_text(
        "from starlette.applications import Starlette\n"
        "from asgi_dbsession import DBSessionMiddleware\n"
        "app = Starlette()\n"
        "app.add_middleware(DBSessionMiddleware)\n"
    )
    server = new_shop.start(url="hush")
    await becomes_true(lambda: server.process.poll() is not None, seconds=20)
    assert server.process.returncode in new_shop.kind.refusals
    assert "This is not a database URL" in server.printed
    assert "hush" not in server.printed


@EVERY_SERVER
async def test_a_server_exits_so_without_the_middleware_too(new_shop: Shop) -> None:
    """The exit status after SIGTERM is the same without the middleware."""
    new_shop.file.write_text(BARE)
    assert (await new_shop.start().serving()).stop() == new_shop.kind.exit_status


WITHOUT_LIFESPAN = pytest.mark.parametrize("server", ["daphne"])


@WITHOUT_LIFESPAN
@pytest.mark.parametrize("database", ["async", "sync"])
async def test_a_server_without_a_lifespan_is_answered_with_what_to_do(
    server: str, database: str, tmp_path: Path
) -> None:
    """Daphne sends no lifespan, so the error of the database says what to write."""
    shop = Shop(server, tmp_path, "servers", database)
    shop.real.url = shop.real.url.set(drivername="postgresql")
    try:
        serving = await shop.start().serving()
        assert serving.get().status_code == 500
        name = "AsyncDatabase" if database == "async" else "SyncDatabase"
        cure = f"If the server sends no lifespan (daphne), use `{name}.from_engine(engine)`."
        await becomes_true(lambda: cure in serving.printed)
    finally:
        shop.close()


@WITHOUT_LIFESPAN
async def test_a_server_without_a_lifespan_starts_without_its_database(
    new_shop: Shop, closed_port: URL
) -> None:
    """Each request with a database gets a 500 without details; other requests are served."""
    server = new_shop.start(url=closed_port.render_as_string(hide_password=False))
    await server.serving()
    response = server.get()
    assert response.status_code == 500
    assert str(closed_port.port) not in response.text
    assert server.status()["held"] == 0
    await becomes_true(lambda: str(closed_port.port) in server.printed)
    assert "hush" not in server.printed


@WITHOUT_LIFESPAN
async def test_a_server_that_cancels_what_is_under_way_stores_nothing_of_it(new_shop: Shop) -> None:
    """At SIGTERM daphne cancels the request, and its client gets no success."""
    statuses: list[int] = []

    def post() -> None:
        try:
            statuses.append(server.post("slow").status_code)
        except httpx2.TransportError:
            statuses.append(0)

    server = await new_shop.start().serving()
    request = threading.Thread(target=post)
    request.start()
    await becomes_true(lambda: new_shop.real.open_transactions() == 1)
    server.stop()
    request.join()
    await becomes_true(lambda: new_shop.real.connections() == 0)
    assert new_shop.real.stored() == []
    assert statuses in ([0], [500])


def test_the_docs_show_the_commands_that_are_tested() -> None:
    """The docs show each way to run a server, and no way without a test."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", DOCS, re.DOTALL | re.MULTILINE)
    shown = set("".join(blocks).splitlines())
    tested = {
        " ".join([kind.command, *kind.options(option)])
        for kind in KINDS.values()
        for option in (None, "workers", "reload")
    }
    assert shown <= tested
    assert {kind.command for kind in KINDS.values()} <= shown


@EVERY_SERVER
async def test_the_docs_say_what_a_server_does(server: str) -> None:
    """Its exit status."""
    shop = await open_shop(server)
    refusals = " or ".join(map(str, shop.kind.refusals)) or "it starts"
    assert f"| {server} | {shop.kind.exit_status} | {refusals} |" in DOCS


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_of_the_docs_makes_an_application(
    block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The URL of the database comes from the environment, and no request uses the database yet."""
    asynchronous = "create_async_engine" in block
    monkeypatch.setenv("DATABASE_URL", f"sqlite{'+aiosqlite' * asynchronous}:///shop.db")
    namespace: dict[str, Any] = {}
    exec(compile(block, "servers.md", "exec"), namespace)
    assert callable(namespace["app"])
