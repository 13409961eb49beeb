"""Tests what the application and its tests are told about an `AsyncSession` without `await`."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
from asgi import get
from conftest import ENTRY, Running
from fastapi import Depends, FastAPI
from machine import FEW_PLUGINS
from pages import Page
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

import asgi_dbsession
from asgi_dbsession import (
    ConfigurationError,
    DBSessionMiddleware,
    get_session,
    session_dependency,
)

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("real", ["sqlite"], indirect=True)]
LIMITS = Page("docs/explanation/what-cannot-be-promised.md")
INSERT = ENTRY.insert().values(note="forgotten")


def with_fastapi() -> Any:
    app = FastAPI()

    @app.get("/")
    def handler(session: Annotated[AsyncSession, Depends(session_dependency)]) -> str:
        statement: Any = session.execute  # type checkers would report the forgotten `await`
        statement(INSERT)
        return "stored"

    return app


def with_starlette() -> Any:
    def handler(request: Request) -> PlainTextResponse:
        statement: Any = get_session().execute
        statement(INSERT)
        return PlainTextResponse("stored")

    return Starlette(routes=[Route("/", handler)])


@pytest.mark.parametrize("application", [with_fastapi, with_starlette])
async def test_an_async_session_in_a_def_handler_fails_the_request(
    running: Running, application: Callable[[], Any]
) -> None:
    """The client gets no success for a statement that never ran."""
    exchange = await get(DBSessionMiddleware(application(), running.database))
    assert exchange.status == 500
    assert isinstance(exchange.error, ConfigurationError)
    assert "`await` the call, or use a SyncDatabase" in str(exchange.error)
    assert running.stored() == []


PROGRAM = """
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import text

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware, get_session

app = FastAPI()
app.add_middleware(DBSessionMiddleware, AsyncDatabase("sqlite:///shop.db"))


@app.post("/")
async def add() -> None:
    get_session().execute(text("INSERT INTO product VALUES ('tea')"))


def test_it():
    with TestClient(app) as client:
        assert client.post("/").status_code == 200
"""


@pytest.mark.parametrize("is_configured", [True, False])
def test_the_options_of_the_page_fail_a_test_of_a_forgotten_await(
    tmp_path: Path, real: Any, is_configured: bool
) -> None:
    """Without these options the test passes: the client got a success, and nothing was stored."""
    (tmp_path / "test_shop.py").write_text(PROGRAM)
    (settings,) = LIMITS.blocks("ini")
    (tmp_path / "pytest.ini").write_text(settings if is_configured else "[pytest]\n")
    path = [str(Path(asgi_dbsession.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTEST_ADDOPTS": ""} | FEW_PLUGINS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ("1 failed" in finished.stdout) == is_configured, finished.stdout
    assert ("1 passed" in finished.stdout) == (not is_configured)
    assert "coroutine" in finished.stdout
