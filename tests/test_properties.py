"""The rules of a unit of work hold for any sequence of messages, and for any failure.

Hypothesis makes up applications, clients and failures; `rules.py` tells what they must come to.
Many more: `HYPOTHESIS_PROFILE=long python -m pytest -o timeout=0 tests/test_properties.py`.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from contextvars import Context, copy_context
from dataclasses import dataclass
from typing import Any

import pytest
from anyio import to_thread
from asgi import respond
from conftest import CHILD, ENTRY, METADATA, AnyDatabase, checked_out, set_up_sqlite
from hypothesis import example, given, strategies as st
from rules import HTTP, KEYS, SOCKET, Broken, Case, Expected, ExpectedOfSocket, Step
from sqlalchemy import create_engine, event, select
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Session
from sqlalchemy.pool import NullPool

from asgi_dbsession import (
    AsyncDatabase,
    DBSessionMiddleware,
    SessionClosed,
    SyncDatabase,
    on_commit,
    set_rollback,
)

# SQLAlchemy rightly warns about objects that are added when only `rollback()` may follow.
pytestmark = pytest.mark.filterwarnings("ignore:Session's state has been changed on a non-active")


class Base(DeclarativeBase):
    """The base of the mapped class."""


class Entry(Base):
    """A row that is added, but not yet inserted."""

    __table__ = ENTRY


@dataclass
class Bench:
    """A database with its event loop, and a connection that sees what is stored."""

    runner: asyncio.Runner
    database: AnyDatabase
    reader: sqlite3.Connection

    def stored(self) -> list[int]:
        """Return the stored rows, without the row that is always there."""
        rows = self.reader.execute("SELECT id FROM entry WHERE id < 1000 ORDER BY id")
        return [number for (number,) in rows]

    def empty(self) -> None:
        """Delete all rows; fail if a transaction is still open."""
        self.reader.execute("DELETE FROM child")
        self.reader.execute("DELETE FROM entry WHERE id < 1000")


@pytest.fixture(scope="module", params=[AsyncDatabase, SyncDatabase])
def bench(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    """All sequences share one database, so that open work of one sequence disturbs the next."""
    path = tmp_path_factory.mktemp("properties") / "test.db"
    engine = create_engine(f"sqlite:///{path}", poolclass=NullPool)
    METADATA.create_all(engine)
    reader = sqlite3.connect(path, isolation_level=None, timeout=0, check_same_thread=False)
    reader.execute("PRAGMA synchronous = OFF")
    reader.execute("INSERT INTO entry VALUES (1000, 'taken')")

    def prepare(connection: Any, record: Any) -> None:
        set_up_sqlite(connection, record)
        connection.isolation_level = None  # otherwise a savepoint would not be a transaction

    database = request.param(
        f"sqlite:///{path}",
        session_options={"autoflush": False},
        pool_events=[(prepare, "connect")],
    )
    with asyncio.Runner() as runner:
        runner.run(database.startup())
        engine = getattr(database.engine, "sync_engine", database.engine)
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
        yield Bench(runner, database, reader)
        runner.run(database.shutdown())
    reader.close()


class Application:
    """Runs a case: the application, the server around it, and their results."""

    def __init__(self, case: Case, bench: Bench, kind: str) -> None:
        self.case = case
        self.bench = bench
        self.scope = {"type": kind, "path": "/"}
        self.prefix = "http.response." if kind == "http" else "websocket."
        self.messages = HTTP if kind == "http" else SOCKET
        self.story: list[Any] = []
        self.held: list[int] = []
        self.error: type[BaseException] | None = None
        self.sends = 0
        self.receives = 0
        self.session: Any = None
        self.context: Context | None = None

    async def run(self) -> "Application":
        """Serve the case, and check the remaining state."""
        apology = self.case.apology

        def apologize(_: Exception) -> Any:
            async def answer(scope: Any, receive: Any, send: Any) -> None:
                await respond(send, apology or 0)

            return answer if apology else None

        app = DBSessionMiddleware(self, self.bench.database, on_commit_error=apologize)
        # If aiosqlite is cancelled while it opens a file, it leaves the file open.
        await self.bench.database.ping()
        try:
            await asyncio.create_task(app(self.scope, self.receive, self.send))
        except BaseException as error:
            self.error = _kind_of(error)
        assert checked_out(self.bench.database) == 0
        if self.context is not None:
            with pytest.raises(SessionClosed):
                self.context.run(self.bench.database.get_session)
        if self.session is not None:
            with pytest.raises(SessionClosed):
                await self.on_session(lambda session: session.execute(select(1)), self.session)
        return self

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.context = copy_context()
        for number, step in enumerate(self.case.steps):
            try:
                if number == self.case.cancelled_at:
                    _cancel()
                try:
                    await self.perform(number, step, receive, send)
                finally:
                    if number == self.case.cancelled_at:
                        await asyncio.sleep(0)  # the cancellation was not noticed
            except self.case.catches:
                continue

    async def perform(self, number: int, step: Step, receive: Any, send: Any) -> None:
        match step.do:
            case message if message in self.messages:
                content = {"type": self.prefix + message, **self.messages[message]}
                if step.value is not None:
                    content[KEYS[message]] = step.value
                await send(content)
            case "receive":
                await receive()
            case "set_rollback":
                set_rollback(step.value)
            case "on_commit":
                on_commit(self.follower(number, step.value))
            case "raise":
                raise Broken
            case "cancel":
                _cancel()
                await asyncio.sleep(0)
            case _:
                self.session = self.bench.database.get_session()
                await self.on_session(lambda session: self.work(session, number, step))

    def work(self, session: Session, number: int, step: Step) -> None:
        row = {"id": number, "note": str(number)}
        match step.do:
            case "write":
                session.execute(ENTRY.insert().values(row))
            case "read":
                session.execute(select(ENTRY)).all()
            case "doom":
                session.execute(CHILD.insert().values(entry_id=-1))
            case "swallow":
                try:
                    session.execute(ENTRY.insert().values(note="taken"))
                except IntegrityError:
                    return
            case "add":
                session.add(Entry(**row))
            case "add twice":
                session.add(Entry(id=number, note="taken"))
            case "flush":
                session.add(Entry(**row))
                session.flush()
            case "savepoint":
                savepoint = session.begin_nested()
                session.execute(ENTRY.insert().values(row))
                on_commit(self.follower(number, "plain"))
                savepoint.commit() if step.value == "kept" else savepoint.rollback()
            case "commit":
                session.commit()
            case "rollback":
                session.rollback()

    async def on_session(self, work: Callable[[Session], Any], session: Any = None) -> None:
        session = session or self.bench.database.get_session()
        if isinstance(session, AsyncSession):
            await session.run_sync(work)
        else:
            await to_thread.run_sync(work, session)

    def follower(self, number: int, kind: str) -> Any:
        def plain() -> None:
            self.story.append(("ran", number, self.bench.stored()))
            if kind == "failing":
                raise Broken

        async def writing() -> None:
            plain()
            row = {"id": number, "note": str(number)}
            await self.on_session(lambda session: session.execute(ENTRY.insert().values(row)))

        return writing if kind == "writing" else plain

    async def send(self, message: Any) -> None:
        self.sends += 1
        if self.sends >= self.case.client_leaves_at:
            raise OSError
        kind = message["type"].removeprefix(self.prefix)
        is_refused = kind == "start" and any(
            isinstance(each[0], Step) and each[0].do == "start" for each in self.story
        )
        if kind in ("start", "accept", "send", "close") and not is_refused:
            self.held.append(checked_out(self.bench.database))
        step = Step(kind, message.get(KEYS.get(kind)))
        self.story.append((step, self.bench.stored()))
        await asyncio.sleep(0)

    async def receive(self) -> Any:
        self.receives += 1
        if self.receives >= self.case.silence_at:
            raise OSError
        await asyncio.sleep(0)
        return {"type": f"{self.scope['type']}.disconnect", "code": 1006}


def _cancel() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()


def _kind_of(error: BaseException) -> type[BaseException]:
    kinds = (IntegrityError, InvalidRequestError)
    return next((kind for kind in kinds if isinstance(error, kind)), type(error))


# Failures are rare, because otherwise few sequences would reach their end.
WORK = st.sampled_from(
    [
        *[Step("write")] * 6,
        *[Step(each) for each in ("read", "add", "flush", "swallow", "commit", "rollback")],
        *[Step("savepoint", each) for each in ("kept", "undone")],
        *[Step("set_rollback", each) for each in (True, True, False, False)],
        *[Step("on_commit", each) for each in ("plain", "plain", "failing", "writing")],
        *[Step(each) for each in ("doom", "add twice", "raise", "cancel")],
    ]
)
STATUS = st.sampled_from([200, 201, 303, 399, 400, 404, 500]) | st.integers(100, 599)
START = st.builds(Step, st.just("start"), STATUS)
MORE, END = Step("body", value=True), st.sampled_from([Step("body"), Step("pathsend")])
OTHER = st.sampled_from(
    [Step(each) for each in ("early_hint", "debug", "trailers", "surprise", "receive")]
)


def several(*steps: st.SearchStrategy[Step]) -> st.SearchStrategy[list[Step]]:
    return st.lists(st.one_of(WORK, *steps), max_size=4)


def in_sequence(*parts: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Step, ...]]:
    return st.tuples(*parts).map(
        lambda each: tuple(
            step for part in each for step in (part if isinstance(part, list) else [part])
        )
    )


ANY_HTTP = several(WORK, OTHER, START, st.just(MORE), END)
EXCHANGES = st.one_of(
    in_sequence(
        several(WORK, OTHER), START, several(WORK, OTHER, st.just(MORE)), END, several(WORK)
    ),
    in_sequence(several(WORK, OTHER), START, several(WORK, OTHER, st.just(MORE))),
    in_sequence(ANY_HTTP, ANY_HTTP, ANY_HTTP),
)
CLOSE = st.builds(Step, st.just("close"), st.sampled_from([None, 1000, 1001, 1006, 1011, 4000]))
DENIAL = st.builds(Step, st.just("http.response.start"), STATUS)
TALK = st.sampled_from([Step("send"), Step("receive"), Step("surprise")])
ANY_SOCKET = several(
    WORK, TALK, CLOSE, DENIAL, st.just(Step("accept")), st.just(Step("http.response.body"))
)
SOCKETS = st.one_of(
    in_sequence(
        st.just(Step("receive")),
        several(WORK),
        st.just(Step("accept")),
        several(WORK, TALK),
        several(WORK, TALK),
        CLOSE,
        several(WORK),
    ),
    in_sequence(st.just(Step("receive")), several(WORK), DENIAL, several(WORK)),
    in_sequence(ANY_SOCKET, ANY_SOCKET, ANY_SOCKET),
)


@st.composite
def cases(draw: st.DrawFn, sequences: st.SearchStrategy[tuple[Step, ...]]) -> Case:
    steps = draw(sequences)
    catches = draw(st.sampled_from([(), (), (), (Exception,), (BaseException,)]))
    cancelled_at = draw(st.none() | st.none() | st.integers(0, max(0, len(steps) - 1)))
    if cancelled_at is not None and steps:
        do = steps[cancelled_at].do
        # The result of a cancelled COMMIT of the application itself is unknown.
        is_unknown = do == "commit" or (BaseException in catches and do not in HTTP | SOCKET)
        cancelled_at = None if is_unknown else cancelled_at
    calls = st.sampled_from([99, 99, 99, 99, 99, 1, 2, 3, 4])
    apology = draw(st.sampled_from([None, 503]))
    return Case(steps, cancelled_at, catches, draw(calls), draw(calls), apology)


def come_true(kind: str, case: Case, expected_class: type[Expected], bench: Bench) -> None:
    """Run a case, and compare all observable results with the model."""
    bench.empty()
    seen = Application(case, bench, kind)
    bench.runner.run(seen.run())
    assert not any(seen.held), "a connection was held while a message left"
    outcome = seen.story, seen.error, set(bench.stored())
    sent, held_back = (expected_class(case, each).tell().outcome for each in (False, True))
    assert outcome == (held_back if outcome == held_back else sent)


def undisturbed(*steps: Step) -> Case:
    return Case(steps, None, (), 99, 99, None)


@given(case=cases(EXCHANGES))
@example(undisturbed(Step("write"), Step("start", 399), Step("body")))
@example(undisturbed(Step("write"), Step("start", 400), Step("body")))
@example(
    undisturbed(Step("set_rollback", value=True), Step("start", 200), Step("write"), Step("body"))
)
def test_any_exchange_comes_to_what_the_rules_say(bench: Bench, case: Case) -> None:
    """Stored rows, sent messages, called functions, their order and the error are right."""
    come_true("http", case, Expected, bench)


@given(case=cases(SOCKETS))
def test_any_socket_comes_to_what_the_rules_say(bench: Bench, case: Case) -> None:
    """The same results are right on a WebSocket, before and after acceptance or denial."""
    come_true("websocket", case, ExpectedOfSocket, bench)
