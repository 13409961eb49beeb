"""Tests the package as a whole: its names, its types and its dependencies."""

import importlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import asgi_dbsession

ROOT = Path(asgi_dbsession.__file__).parents[1]

PUBLIC = {
    "AsyncDatabase",
    "Attempt",
    "ConcurrentUse",
    "ConfigurationError",
    "DBSessionError",
    "DBSessionMiddleware",
    "DatabaseNotRunning",
    "DatabaseReport",
    "DatabaseUnavailable",
    "ForbiddenWrite",
    "Health",
    "NoSession",
    "PrematureClose",
    "Replicas",
    "ServerTimingMiddleware",
    "SessionClosed",
    "SyncDatabase",
    "TransactionAborted",
    "UnitReport",
    "current_attempt",
    "get_session",
    "get_sync_session",
    "on_commit",
    "safe_methods",
    "session_dependency",
    "set_rollback",
    "warn_when_idle",
}

# Code that type checkers must accept, and code with an ignore that they must refuse.
SNIPPET = """\
# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
from typing import assert_type

import httpx2
import sqlmodel
import uvicorn
from sqlalchemy import URL, Engine, create_engine, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlmodel.ext.asyncio.session import AsyncSession as ModelSession
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse, Response
from starlette.types import Scope

from asgi_dbsession import (
    AsyncDatabase,
    DBSessionMiddleware,
    SyncDatabase,
    get_session,
    get_sync_session,
    session_dependency,
    set_rollback,
)


class Mine(AsyncSession):
    pass


shop = AsyncDatabase("sqlite://")
models = AsyncDatabase("sqlite://", session_options={"class_": ModelSession})
mine = AsyncDatabase(
    make_url("sqlite://"), session_options={"class_": Mine, "autoflush": False}, pool_size=5
)
reports = SyncDatabase("sqlite://", ping_on_startup=False)
sync_models = SyncDatabase("sqlite://", session_options={"class_": sqlmodel.Session})
assert_type(shop, AsyncDatabase[AsyncSession])
assert_type(models, AsyncDatabase[ModelSession])
assert_type(reports, SyncDatabase[Session])


async def accessors() -> None:
    assert_type(get_session(), AsyncSession)
    assert_type(await session_dependency(), AsyncSession)
    assert_type(get_sync_session(), Session)
    assert_type(shop.get_session(), AsyncSession)
    assert_type(models.get_session(), ModelSession)
    assert_type(mine.get_session(), Mine)
    assert_type(reports.get_session(), Session)
    assert_type(sync_models.get_session(), sqlmodel.Session)
    assert_type(await models.session_dependency(), ModelSession)
    assert_type(await reports.session_dependency(), Session)
    set_rollback(True)


async def units_of_work() -> None:
    async with shop as started:
        assert_type(started, AsyncDatabase[AsyncSession])
        async with shop.begin() as session:
            assert_type(session, AsyncSession)
        async with models.begin() as model_session:
            assert_type(model_session, ModelSession)
        with reports.begin() as sync_session:
            assert_type(sync_session, Session)
        with sync_models.begin() as sync_model_session:
            assert_type(sync_model_session, sqlmodel.Session)


@shop.begin(join=True)
async def place(number: int, *, note: str = "") -> str:
    return note * number


@reports.begin(join=True)
def sell(number: int) -> bytes:
    return bytes(number)


async def decorated() -> None:
    assert_type(await place(2, note="x"), str)
    assert_type(sell(1), bytes)
    assert_type(await shop.run_transaction(place, 2, attempts=5), str)
    assert_type(reports.run_transaction(sell, 1, retry_on=ValueError), bytes)
    await shop.run_transaction(place, "2")  # type: ignore
    await place("2")  # type: ignore
    sell()  # type: ignore


async def life() -> None:
    assert_type(await shop.startup(), None)
    assert_type(shop.engine, AsyncEngine)
    assert_type(reports.engine, Engine)
    assert_type(shop.url, URL)
    assert_type(shop.is_running, bool)
    await shop.ping()
    await shop.shutdown()


def other_ways() -> None:
    assert_type(AsyncDatabase[Mine].from_env("SHOP_URL"), AsyncDatabase[Mine])
    assert_type(
        AsyncDatabase.from_engine(create_async_engine("sqlite+aiosqlite://")).get_session(),
        AsyncSession,
    )
    assert_type(SyncDatabase.from_engine(create_engine("sqlite://")).get_session(), Session)
    assert_type(AsyncDatabase.from_env().get_session(), AsyncSession)


def is_success(status: int) -> bool:
    return status < 500


def by_path(status: int, scope: Scope) -> bool:
    return status < 400 and scope["path"] != "/preview"


def busy(error: Exception) -> Response | None:
    return PlainTextResponse("try again", 503) if error.args else None


app = Starlette(middleware=[Middleware(DBSessionMiddleware, shop, reports)])
app.add_middleware(DBSessionMiddleware)
app.add_middleware(DBSessionMiddleware, "sqlite://", make_url("sqlite://"), shop, sync_models)
app.add_middleware(DBSessionMiddleware, mine, commit_when=by_path, attempts=2, retry_on=KeyError)
app.add_middleware(DBSessionMiddleware, mine, commit_when=is_success, on_commit_error=busy)
wrapped = DBSessionMiddleware(DBSessionMiddleware(app, shop), models)
transport = httpx2.ASGITransport(app=wrapped)
config = uvicorn.Config(wrapped)

app.add_middleware(DBSessionMiddleware, 1)  # type: ignore
DBSessionMiddleware(app, shop, commit_when=400)  # type: ignore
AsyncDatabase("sqlite://", session_options={"class_": Session})  # type: ignore
SyncDatabase("sqlite://", session_options={"class_": AsyncSession})  # type: ignore
AsyncDatabase("sqlite://", session_options={"expire": True})  # type: ignore
AsyncDatabase.from_engine(create_engine("sqlite://"))  # type: ignore
"""


def run(*command: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run a module in a folder where only an installed package can be imported."""
    python = Path(sys.executable)
    return subprocess.run(
        [str(python), *command],
        cwd=folder,
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            # mypy finds installed packages itself.
            "MYPYPATH": "" if ROOT.name == "site-packages" else str(ROOT),
            # pyright asks the first `python` there where packages are.
            "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
        },
        capture_output=True,
        text=True,
        check=False,
    )


def needs(tool: str) -> pytest.MarkDecorator:
    """Skip the test without the type checker."""
    missing = importlib.util.find_spec(tool) is None
    return pytest.mark.skipif(missing, reason=f"{tool} is not installed")


def test_the_public_names_are_these() -> None:
    """The public names are complete and sorted, and each of them exists."""
    assert asgi_dbsession.__all__ == sorted(PUBLIC)
    for name in PUBLIC:
        assert hasattr(asgi_dbsession, name)


def test_nothing_else_is_in_the_front_room() -> None:
    """Other names that completion offers are modules of the package."""
    modules = {path.stem for path in (ROOT / "asgi_dbsession").iterdir()}
    names = {name for name in vars(asgi_dbsession) if not name.startswith("_")}
    assert names - PUBLIC <= modules


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_explains_itself(name: str) -> None:
    """Each public method and property of a public class has a docstring too."""
    thing = getattr(asgi_dbsession, name)
    assert thing.__doc__
    if inspect.isclass(thing):
        ours = [each for each in thing.__mro__ if each.__module__.startswith("asgi_dbsession")]
        members = {name for each in ours for name in vars(each) if not name.startswith("_")}
        assert [each for each in members if not inspect.getdoc(getattr(thing, each))] == []


def test_every_error_is_one_of_ours_and_one_that_a_caller_would_expect() -> None:
    """`except DBSessionError` catches all errors, and so does the built-in base class."""
    expected = {
        "ConcurrentUse": RuntimeError,
        "ConfigurationError": ValueError,
        "DatabaseNotRunning": RuntimeError,
        "DatabaseUnavailable": ConnectionError,
        "ForbiddenWrite": RuntimeError,
        "NoSession": LookupError,
        "SessionClosed": RuntimeError,
    }
    for name in PUBLIC:
        thing = getattr(asgi_dbsession, name)
        if inspect.isclass(thing) and issubclass(thing, Exception):
            assert issubclass(thing, asgi_dbsession.DBSessionError)
            assert issubclass(thing, expected.get(name, Exception))


def test_the_marker_for_type_checkers_is_shipped() -> None:
    """It is in the package and in its wheel."""
    assert (ROOT / "asgi_dbsession" / "py.typed").is_file()
    project = ROOT / "pyproject.toml"
    if not project.exists():
        return  # this is the installed wheel
    setuptools = tomllib.loads(project.read_text())["tool"]["setuptools"]
    assert "py.typed" in setuptools["package-data"]["asgi_dbsession"]
    packages = {path.parent for path in (ROOT / "asgi_dbsession").rglob("__init__.py")}
    assert {".".join(each.relative_to(ROOT).parts) for each in packages} == set(
        setuptools["packages"]
    )


def test_it_needs_no_framework_and_imports_none(tmp_path: Path) -> None:
    """The dependencies are SQLAlchemy, anyio and typing-extensions; Starlette is not needed."""
    finished = run(
        "-c",
        "import sys\n"
        "import aiosqlite, anyio.to_thread, sqlalchemy.ext.asyncio, typing_extensions\n"
        "sys.modules['starlette'] = None  # importing it fails\n"
        "before = set(sys.modules)\n"
        "from asgi_dbsession import DBSessionMiddleware\n"
        "async def app(scope, receive, send): ...\n"
        "DBSessionMiddleware(app, 'sqlite:///shop.db')\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*(new - sys.stdlib_module_names - {'sqlalchemy', 'anyio'}))",
        folder=tmp_path,
    )
    assert finished.stderr == ""
    assert finished.stdout.split() == ["asgi_dbsession"]


@needs("mypy")
def test_mypy_sees_the_types_that_are_promised(tmp_path: Path) -> None:
    """Type checks with mypy in strict mode infer the given session class, and refuse mistakes."""
    (tmp_path / "snippet.py").write_text(SNIPPET)
    finished = run("-m", "mypy", "--strict", "snippet.py", folder=tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@needs("pyright")
def test_pyright_sees_the_types_that_are_promised(tmp_path: Path) -> None:
    """Type checks with pyright in strict mode do the same."""
    (tmp_path / "snippet.py").write_text(SNIPPET)
    finished = run("-m", "pyright", "snippet.py", folder=tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@needs("pyright")
def test_every_type_is_complete(tmp_path: Path) -> None:
    """All public types are explicit, so no type checker has to guess."""
    command = ("-m", "pyright", "--verifytypes", "asgi_dbsession", "--ignoreexternal")
    finished = run(*command, "--outputjson", folder=tmp_path)
    report = json.loads(finished.stdout)["typeCompleteness"]
    unknown = [each["name"] for each in report["symbols"] if not each["isTypeKnown"]]
    assert unknown == []
    assert report["completenessScore"] == 1
