"""The operations of which made-up requests consist, for `test_reads_properties.py`."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from io import BytesIO
from typing import Any

import psycopg
from sqlalchemy import (
    Column,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    func,
    literal_column,
    select,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session
from sqlalchemy.util import await_only

METADATA = MetaData()
NOTE = Table(
    "note",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("text", Text().with_variant(String(255), "mysql"), unique=True),
)
NOWHERE = Table("nowhere", MetaData(), Column("id", Integer))
VIEW = Table("note_view", MetaData(), Column("id", Integer), Column("text", Text))
DEFINITIONS = """
CREATE VIEW note_view AS SELECT id, text FROM note;
CREATE FUNCTION write_note(number int) RETURNS int LANGUAGE sql VOLATILE AS
    'INSERT INTO note VALUES (number, ''function '' || number) RETURNING id';
"""
# The procedure fails after it has written, and its row stays in the transaction.
ON_MARIADB = (
    "CREATE VIEW note_view AS SELECT id, text FROM note",
    (
        "CREATE FUNCTION write_note(number INT) RETURNS INT MODIFIES SQL DATA BEGIN "
        "INSERT INTO note VALUES (number, CONCAT('function ', number)); RETURN number; END"
    ),
    (
        "CREATE PROCEDURE write_and_fail(number INT) BEGIN INSERT INTO note "
        "VALUES (number, CONCAT('procedure ', number)); SELECT * FROM nowhere; END"
    ),
)
FAILING = select(NOWHERE.c.id)
ALL = select(NOTE.c.text).order_by(NOTE.c.text)
UPPER = func.upper(NOTE.c.text)
TENANT = "SELECT current_setting('app.tenant', true)"


class Base(DeclarativeBase):
    """Of what is added."""


class Note(Base):
    """A row, as an object."""

    __table__ = NOTE
    id: Mapped[int]
    text: Mapped[str]


def rows(session: Session, statement: Any, *args: Any) -> list[Any]:
    return [tuple(each) for each in session.execute(statement, *args)]


def rowcount(session: Session, statement: Any) -> int:
    result: Any = session.execute(statement)
    return int(result.rowcount)


def driver_of(session: Session) -> Any:
    return session.connection().connection.driver_connection


def raw(session: Session, statement: str) -> None:
    """Work below SQLAlchemy, with the driver's own connection."""
    driver = driver_of(session)
    if hasattr(driver, "get_autocommit"):  # MariaDB
        cursor = session.connection().connection.cursor()
        cursor.execute(statement)
        cursor.close()
        return
    pending = driver.execute(statement)
    if hasattr(pending, "__await__"):
        await_only(pending)


def copy_in(session: Session, number: int, *, text: str = "copied", as_file: bool = False) -> None:
    driver = driver_of(session)
    row = (number, text if text == "taken" else f"{text} {number}")
    if isinstance(driver, psycopg.Connection | psycopg.AsyncConnection):
        _copy_with_psycopg(driver, "COPY note FROM STDIN", row, as_file=as_file)
    elif as_file:
        await_only(driver.copy_to_table("note", source=BytesIO(_as_line(row))))
    else:
        await_only(driver.copy_records_to_table("note", records=[row]))


def copy_out(session: Session, _number: int) -> bytes:
    driver, query = driver_of(session), "SELECT text FROM note ORDER BY text"
    if isinstance(driver, psycopg.Connection | psycopg.AsyncConnection):
        return _copy_with_psycopg(driver, f"COPY ({query}) TO STDOUT")
    output = BytesIO()
    await_only(driver.copy_from_query(query, output=output))
    return output.getvalue()


def _as_line(row: tuple[int, str]) -> bytes:
    return "{}\t{}\n".format(*row).encode()


def _copy_with_psycopg(
    driver: Any, statement: str, row: tuple[int, str] | None = None, *, as_file: bool = False
) -> bytes:
    async def in_task() -> bytes:
        async with driver.cursor() as cursor, cursor.copy(statement) as copy:
            if row is None:
                return b"".join([bytes(each) async for each in copy])
            await (copy.write(_as_line(row)) if as_file else copy.write_row(row))
            return b""

    if isinstance(driver, psycopg.AsyncConnection):
        return await_only(in_task())
    with driver.cursor() as cursor, cursor.copy(statement) as copy:
        if row is None:
            return b"".join(bytes(each) for each in copy)
        copy.write(_as_line(row)) if as_file else copy.write_row(row)
        return b""


def change(session: Session, number: int, *, flush: bool) -> None:
    found = session.scalars(select(Note).order_by(Note.id).limit(1)).first()
    if found is not None:
        found.text = f"changed {number}"
    if flush:
        session.flush()


def add(session: Session, number: int, *, flush: bool, text: str = "") -> None:
    session.add(Note(id=number, text=text or f"added {number}"))
    if flush:
        session.flush()


def savepoint(session: Session, number: int, *, kept: bool) -> list[Any]:
    nested = session.begin_nested()
    session.execute(NOTE.insert().values(id=number, text=f"nested {number}"))
    found = rows(session, ALL)
    nested.commit() if kept else nested.rollback()
    return found


def failing_savepoint(session: Session, number: int) -> list[Any]:
    with suppress(Exception), session.begin_nested():
        session.execute(NOTE.insert().values(id=number, text=f"gone {number}"))
        session.execute(FAILING)
    return rows(session, ALL)


def stream(session: Session, _number: int) -> list[Any]:
    result = session.execute(ALL, execution_options={"stream_results": True, "max_row_buffer": 1})
    return [tuple(each) for each in result.yield_per(1)]


def insert_in_cte(number: int) -> Any:
    insert = NOTE.insert().values(id=number, text=f"cte {number}").returning(NOTE.c.id)
    return select(insert.cte("inserted").c.id)


# What reads, and begins no transaction where BEGIN is delayed.
PLAIN: dict[str, Callable[[Session, int], Any]] = {
    "all": lambda session, _: rows(session, ALL),
    "count": lambda session, _: session.scalar(select(func.count(NOTE.c.id))),
    "view": lambda session, _: rows(session, select(VIEW.c.text).order_by(VIEW.c.text)),
    "objects": lambda session, _: sorted(each.text for each in session.scalars(select(Note))),
    "get": lambda session, _: getattr(session.get(Note, 1), "text", None),
}
OTHERS: dict[str, Callable[[Session, int], Any]] = {
    "function": lambda session, _: rows(session, select(UPPER).order_by(UPPER)),
    "writing function": lambda session, n: session.scalar(select(func.write_note(n))),
    "text": lambda session, _: rows(session, text("SELECT text FROM note ORDER BY text")),
    "literal column": lambda session, _: session.scalar(select(literal_column("40 + 2"))),
    "for update": lambda session, _: rows(session, ALL.with_for_update()),
    "cte": lambda session, _: rows(session, select(ALL.cte().c.text)),
    "writing cte": lambda session, n: session.scalar(insert_in_cte(n)),
    "lock": lambda session, _: session.scalar(select(func.pg_try_advisory_xact_lock(7))),
    "set local": lambda session, n: bool(session.execute(text(f"SET LOCAL app.tenant = '{n}'"))),
    "tenant": lambda session, _: session.scalar(text(TENANT)) or None,
    "stream": stream,
    "insert": lambda session, n: rowcount(
        session, NOTE.insert().values(id=n, text=f"inserted {n}")
    ),
    "update": lambda session, n: rowcount(
        session, NOTE.update().where(NOTE.c.id == 1).values(text=f"updated {n}")
    ),
    "delete": lambda session, _: rowcount(session, NOTE.delete().where(NOTE.c.id == 2)),
    "add": partial(add, flush=False),
    "flush": partial(add, flush=True),
    "change": partial(change, flush=False),
    "change and flush": partial(change, flush=True),
    "savepoint kept": partial(savepoint, kept=True),
    "savepoint undone": partial(savepoint, kept=False),
    "savepoint failed": failing_savepoint,
    "connection": lambda session, _: session.connection().closed,
    "raw": lambda session, n: raw(session, f"INSERT INTO note VALUES ({n}, 'raw {n}')"),
    "copy": copy_in,
    "copy a file": partial(copy_in, as_file=True),
    "copy out": copy_out,
    "failing copy": partial(copy_in, text="taken"),
    "duplicate": lambda session, n: session.execute(NOTE.insert().values(id=n, text="taken")),
    "no such table": lambda session, _: session.execute(text("SELECT * FROM nowhere")),
    "failing function": lambda session, _: session.scalar(select(func.sqrt(-1))),
    "failing flush": partial(add, flush=True, text="taken"),
    "commit": lambda session, _: session.commit(),
    "rollback": lambda session, _: session.rollback(),
}
# A read that failed aborts no work after it, where there is no transaction: the page says so. So
# this one, alone of all, is never caught.
FATAL: dict[str, Callable[[Session, int], Any]] = {
    "failing read": lambda session, _: session.execute(FAILING)
}
# What somebody else does meanwhile. It waits for nobody.
WRITER = {
    "other inserts": "INSERT INTO note VALUES ({n} + 1000, 'other {n}')",
    "other updates": "UPDATE note SET text = 'other {n} ' || id WHERE id IN "
    "(SELECT id FROM note WHERE id < 3 ORDER BY id FOR UPDATE SKIP LOCKED)",
    "other locks": "SELECT pg_try_advisory_xact_lock(7)",
}
# What only PostgreSQL has, and what only MariaDB has: statements that commit, and a procedure.
_POSTGRESQL = {
    "copy",
    "copy a file",
    "copy out",
    "failing copy",
    "failing function",
    "lock",
    "set local",
    "tenant",
    "writing cte",
}
_MARIADB: dict[str, Callable[[Session, int], Any]] = {
    "create a table": lambda session, n: bool(
        session.execute(text(f"CREATE OR REPLACE TABLE made_{n % 2} (id INT)"))
    ),
    "commit as text": lambda session, _: bool(session.execute(text("COMMIT"))),
    "commit below": lambda session, _: raw(session, "COMMIT"),
    "procedure": lambda session, n: session.execute(text(f"CALL write_and_fail({n})")),
    "procedure below": lambda session, n: raw(session, f"CALL write_and_fail({n})"),
}
# These steps end the transaction, and SQLAlchemy does not know it.
COMMITTING = ("create a table", "commit as text", "commit below")
OTHERS_ON_MARIADB = {
    **{name: do for name, do in OTHERS.items() if name not in _POSTGRESQL},
    **_MARIADB,
}
_WITHOUT_WAITING = "SET STATEMENT innodb_lock_wait_timeout = 0 FOR "
WRITER_ON_MARIADB = {
    "other inserts": f"{_WITHOUT_WAITING} {WRITER['other inserts']}",
    "other updates": f"{_WITHOUT_WAITING} UPDATE note "
    "SET text = CONCAT('other {n} ', id) WHERE id < 3",
}
DO = {**PLAIN, **OTHERS, **_MARIADB, **FATAL}
