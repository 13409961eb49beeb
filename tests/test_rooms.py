"""Tests that imports between the rooms go in one direction, and the core needs no optional room."""

import ast
import importlib
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import Integer, create_engine, select
from sqlalchemy.engine import TwoPhaseTransaction
from sqlalchemy.event import api as event_api
from sqlalchemy.orm import Session, session as orm_session
from sqlalchemy.pool import QueuePool

import asgi_dbsession

HOME = Path(asgi_dbsession.__file__).parent
# Each room imports only from rooms before it.
CORE = ("types", "errors", "session", "unit", "database", "asgi")
# The live page shows reports. No other optional room imports another optional room.
OPTIONAL = ("retry", "reports", "replicas", "testing")
# The features in the folder `optional` of each room of the core.
FEATURES = {
    each.stem: room for room in CORE for each in sorted((HOME / room / "optional").glob("[!_]*"))
}


def room_of(module: str) -> str:
    """`asgi_dbsession.unit.ending` is in `unit`, `asgi_dbsession.unit.optional.join` in `join`."""
    _, *names = module.split(".")
    is_feature = len(names) > 2 and names[1] == "optional"
    return (names[2] if is_feature else names[0]) if names else ""


def imports(path: Path) -> set[str]:
    """Return the rooms that a module imports, without imports inside functions."""
    package = ".".join(path.relative_to(HOME.parent).with_suffix("").parts[:-1])
    found = set()
    for node in ast.parse(path.read_text()).body:
        for each in ast.walk(node) if isinstance(node, ast.If) else [node]:
            if isinstance(each, ast.ImportFrom):
                base = "" if each.level == 0 else package
                name = f"{base}.{each.module}".strip(".") if each.module else base
                found.add(name)
    return {room_of(each) for each in found if each.startswith("asgi_dbsession.")}


def modules(room: str) -> list[Path]:
    """The files of a room or feature."""
    home = HOME / FEATURES[room] / "optional" if room in FEATURES else HOME
    file, folder = home / f"{room}.py", home / room
    inside = [each for each in folder.rglob("*.py") if each.parent.name != "optional"]
    return [file] if file.exists() else [each for each in inside if room_of(_name(each)) == room]


def _name(path: Path) -> str:
    return ".".join(path.relative_to(HOME.parent).with_suffix("").parts)


@pytest.mark.parametrize("room", CORE)
def test_a_room_of_the_core_imports_only_from_those_before_it(room: str) -> None:
    """There is no circle, and no optional room in the core."""
    allowed = set(CORE[: CORE.index(room) + 1])
    for path in modules(room):
        assert imports(path) <= allowed, path


@pytest.mark.parametrize("room", OPTIONAL)
def test_an_optional_room_imports_no_other_optional_room(room: str) -> None:
    """Each optional room can be removed without the others."""
    assert modules(room)
    for path in modules(room):
        assert imports(path) <= {*CORE, room}, path


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_imports_only_what_its_room_may_import(feature: str) -> None:
    """Each feature can be removed without the others."""
    assert modules(feature)
    allowed = {*CORE[: CORE.index(FEATURES[feature]) + 1], feature}
    for path in modules(feature):
        assert imports(path) <= allowed, path


def test_no_two_modules_import_each_other() -> None:
    """There is no circle of modules, even with the imports inside functions."""
    modules = {_name(path): path for path in HOME.rglob("[!_]*.py")}
    modules["asgi_dbsession.session._sqlalchemy"] = HOME / "session" / "_sqlalchemy.py"
    tree = {name: _imported_anywhere(path) & modules.keys() for name, path in modules.items()}
    assert sum(map(len, tree.values())) > 200
    assert list(TopologicalSorter(tree).static_order())


def _imported_anywhere(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            package = _name(path).split(".")[: -node.level] if node.level else []
            base = ".".join([*package, node.module] if node.module else package)
            found |= {base, *(f"{base}.{each.name}" for each in node.names)}
    return found


def test_any_module_can_be_imported_first() -> None:
    """No module needs another one to be imported before."""
    for path in HOME.rglob("*.py"):
        assert importlib.import_module(_name(path).removesuffix(".__init__"))


PROGRAM = """
import asyncio, sys, tempfile
from contextlib import suppress
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from asgi_dbsession import AsyncDatabase, DBSessionMiddleware, get_session

folder = tempfile.TemporaryDirectory()
database = AsyncDatabase(f"sqlite+aiosqlite:///{folder.name}/shop.db")

async def app(scope, receive, send):
    await get_session().execute(text("CREATE TABLE entry (note TEXT)"))
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body"})

async def send(message):
    ...

async def silent(scope, receive, send):
    ...

async def main():
    async with database:
        scope = {"type": "http", "method": "GET", "path": "/"}
        await DBSessionMiddleware(app, database)(scope, None, send)
        async with database.begin() as session:
            await session.execute(text("SELECT 1"))

asyncio.run(main())
"""


def rooms_after(program: str) -> set[str]:
    """Return the rooms that a process has imported after it has run a program."""
    program += "\nprint(*(name for name in sys.modules if name.startswith('asgi_dbsession.')))"
    printed = subprocess.check_output([sys.executable, "-c", program], text=True)
    return {room_of(name) for name in printed.split()}


def test_the_core_alone_imports_no_optional_room() -> None:
    """A request and a `begin()` block without further options import no optional code."""
    assert rooms_after(PROGRAM) == set(CORE)


def test_no_listener_is_added_to_the_engines_of_other_code() -> None:
    """The class `Engine` has no listener of this package, unless the application has one there."""
    program = (
        "\nfrom sqlalchemy import create_engine\n"
        "events = create_engine('sqlite://').dialect.dispatch\n"
        "found = [getattr(events, name) for name in events._event_names]\n"
        "assert len(found) > 5\n"
        "assert not any(map(list, found)), found"
    )
    subprocess.check_output([sys.executable, "-c", PROGRAM + program], text=True)


@pytest.mark.parametrize(
    ("used", "rooms"),
    [
        ("AsyncDatabase('sqlite+aiosqlite:///shop.db?timeout=5')", "urls"),
        (
            "AsyncDatabase.from_engine(create_async_engine('sqlite+aiosqlite:///shop.db'))",
            "borrowed",
        ),
        ("AsyncDatabase('sqlite+aiosqlite://')", "in_memory"),
        (
            "asyncio.run(DBSessionMiddleware(silent, database)({'type': 'websocket'}, None, None))",
            "websocket",
        ),
        (
            "with suppress(OSError): asyncio.run(AsyncDatabase('sqlite:////no/a.db').startup())",
            "failures",
        ),
        ("asyncio.run(database.health())", "health failures"),
        ("DBSessionMiddleware(app, database, attempts=2, retry_on=KeyError)", "retry"),
        ("DBSessionMiddleware(app, database, on_report=print)", "reports"),
        ("from asgi_dbsession import warn_when_idle", "reports"),
    ],
)
def test_an_optional_room_is_imported_when_it_is_used(used: str, rooms: str) -> None:
    """And no other optional room."""
    assert rooms_after(PROGRAM + used) == {*CORE, *rooms.split()}


def test_nothing_is_imported_between_a_commit_and_its_functions() -> None:
    """If an import failed there, the client would get an error although the work is stored."""
    program = (
        "import sys\n"
        "from asgi_dbsession import on_commit\n"
        "print('asgi_dbsession.unit.optional.after_commit.call' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "True\n"


def test_no_file_is_too_long_to_read_at_once() -> None:
    """No file has more than 250 lines."""
    lengths = {path: len(path.read_text().splitlines()) for path in HOME.rglob("*.py")}
    assert {path: length for path, length in lengths.items() if length > 250} == {}


NAMES = {
    "session": (
        "_transaction",
        "_nested_transaction",
        "_autobegin_t",
        "_autoflush",
        "_flushing",
        "_is_clean",
    ),
    "transaction": ("_prepare_impl", "_state", "_connection_for_bind", "_connections"),
    "connection": ("_dbapi_connection",),
    "pooled": ("_connection_record", "_pool"),
    "pool": ("_max_overflow",),
    "copy": ("_proxied",),
    "dialect": ("_on_connect_isolation_level", "_has_events"),
    "context": ("_is_server_side",),
    "select": ("_prefixes", "_suffixes", "_hints", "_statement_hints", "_propagate_attrs"),
    "type": ("_has_column_expression", "_has_bind_expression"),
    "registry": ("_sessions",),
    "event": ("_event_key",),
}


@pytest.mark.parametrize(("owner", "name"), [(each, n) for each in NAMES for n in NAMES[each]])
def test_sqlalchemy_still_has_the_private_names_that_are_used(owner: str, name: str) -> None:
    """If a name is missing, change `asgi_dbsession/session/_sqlalchemy.py`."""
    engine = create_engine("sqlite://", poolclass=QueuePool)
    with Session(engine) as session:
        owners = {
            "session": session,
            "transaction": session.begin(),
            "connection": session.connection(),
            "pooled": session.connection().connection,
            "pool": engine.pool,
            "copy": engine.execution_options(),
            "dialect": engine.dialect,
            "context": cast("Any", session.execute(select(1))).context,
            "select": select(1),
            "type": Integer(),
            "registry": orm_session,
            "event": event_api,
        }
        assert hasattr(owners[owner], name), f"SQLAlchemy has no {name} any more"
    engine.dispose()


def test_sqlalchemy_still_marks_what_is_prepared() -> None:
    """An attribute that only its constructor sets."""
    assert "_is_prepared" in TwoPhaseTransaction.__init__.__code__.co_names


def test_private_names_of_sqlalchemy_are_in_one_file() -> None:
    """All other files of the core use only public names of SQLAlchemy."""
    strange = []
    for room in CORE:
        for path in modules(room):
            if path.name == "_sqlalchemy.py":
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if (
                    isinstance(node, ast.Attribute)
                    and node.attr.startswith("_")
                    and not node.attr.startswith("__")
                ):
                    value = node.value
                    name = value.id if isinstance(value, ast.Name) else getattr(value, "attr", "")
                    if name in {
                        "session",
                        "orm",
                        "transaction",
                        "connection",
                        "dialect",
                        "engine",
                        "pool",
                    }:
                        strange.append(f"{path.name}: {name}.{node.attr}")
    assert [each for each in strange if not each.endswith("._companion")] == []
