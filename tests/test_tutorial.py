"""Follows the tutorial from the empty folder to the deployment, and compares each result."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import postgres
import pytest
from conftest import becomes_true
from machine import FEW_PLUGINS
from pages import Page

import asgi_dbsession

TUTORIAL = Page("docs/tutorial.md")
MIGRATE, RUN, REFUSE = "Make the tables", "Run it", "Answer a COMMIT that fails"
PORT = re.compile(r"running on http://\S+?:(\d+)")

pytestmark = pytest.mark.anyio


class Reader:
    """A reader who follows the tutorial in an empty folder.

    Args:
        folder: That folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        package = str(Path(asgi_dbsession.__file__).parents[1])
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")]),
            "PYTEST_ADDOPTS": "-W error -p anyio -p no:cacheprovider",
            **FEW_PLUGINS,
        }
        self._changes: tuple[str, ...] = ()

    def change(self, section: str) -> None:
        """Apply the diff of a section."""
        self._changes = (section,)
        self._save()

    def type(self, section: str, **variables: str) -> None:
        """Run the commands of a section, without installations and servers."""
        for command in TUTORIAL.commands(section):
            self._save()
            if match := re.fullmatch(r"export (\w+)=(\S+)", command):
                name, value = match.groups()
                self.environment[name] = variables.get(name, value)
            elif command.startswith(("alembic", "pytest")):
                self._run(command)

    @asynccontextmanager
    async def serving(self, section: str) -> AsyncIterator[httpx2.AsyncClient]:
        """Run the server of a section, on a free port."""
        (command,) = (each for each in TUTORIAL.commands(section) if each.startswith("uvicorn"))
        log = self.folder / "log"
        with log.open("w") as output:
            server = subprocess.Popen(  # noqa: ASYNC220 - it is started once, and at once
                words(command.replace("8000", "0")),
                cwd=self.folder,
                env=self.environment,
                stdout=output,
                stderr=output,
            )
        try:
            workers = 2 if "--workers 2" in command else 1
            await becomes_true(lambda: is_ready(log.read_text(), workers), seconds=30)
            url = f"http://127.0.0.1:{PORT.findall(log.read_text())[0]}"
            one_each = httpx2.Limits(max_keepalive_connections=0)  # as curl sends it
            async with httpx2.AsyncClient(base_url=url, limits=one_each, trust_env=False) as client:
                yield client
        finally:
            server.terminate()
            server.wait()

    def _save(self) -> None:
        for name, code in TUTORIAL.files(*self._changes).items():
            if (self.folder / name).parent.exists():  # `migrations` comes in a later section
                (self.folder / name).write_text(code)

    def _run(self, command: str) -> None:
        finished = subprocess.run(
            words(command),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr


def is_ready(log: str, workers: int) -> bool:
    """Return True if a server has printed that it serves."""
    return bool(PORT.search(log)) and log.count("startup complete") == workers


def words(command: str) -> list[str]:
    """Return a command with the Python that runs the tests."""
    return [sys.executable, "-m", *shlex.split(command)]


async def hold(client: httpx2.AsyncClient, conversation: list[tuple[str, str]]) -> None:
    """Send each curl request, and expect the answer below it."""
    assert conversation
    for command, answer in conversation:
        address, *options = shlex.split(command.removeprefix("curl "))
        path = address.removeprefix("localhost:8000")
        if options:
            assert options[::2] == ["-H", "-d"]
            header, content = options[1::2]
            headers = dict([header.split(": ")])
            response = await client.post(path, content=content, headers=headers)
        else:
            response = await client.get(path)
        assert response.text == answer, command


async def test_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    """Test every file, every command, and every printed answer, with a real server."""
    reader = Reader(tmp_path)
    reader.type(MIGRATE)
    *before, after = TUTORIAL.answers(REFUSE)
    async with reader.serving(RUN) as client:
        await hold(client, TUTORIAL.answers(RUN))
        await hold(client, before)
    reader.change(REFUSE)
    async with reader.serving(RUN) as client:
        await hold(client, [after])
    reader.type("Test it")
    url = postgres.new_database("tutorial").render_as_string(hide_password=False)
    reader.type("Deploy it", DATABASE_URL=url)
    async with reader.serving("Deploy it") as client:
        await hold(client, TUTORIAL.answers(RUN))
