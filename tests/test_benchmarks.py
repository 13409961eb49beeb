"""Tests the speed measurements in their short form: `python -m benchmarks.speed`."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

from sqlalchemy import create_engine
from sqlalchemy.pool import QueuePool

from benchmarks.speed.clients import read_slowly
from benchmarks.speed.server import Door

ROOT = Path(__file__).parents[1]


def test_the_page_of_speed_is_complete_and_made_from_the_kept_figures(tmp_path: Path) -> None:
    """The short form of `python -m benchmarks.speed` writes each figure of the page.

    This is one test, because pytest-xdist would run the command once in each of its processes.
    """
    _run("benchmarks.speed", "--quick", "--write", str(tmp_path))
    document = (tmp_path / "speed.md").read_text()
    _each_tool_is_in_each_table(document)
    _readers_can_repeat_it(document)
    _the_picture_has_each_tool((tmp_path / "speed.svg").read_text())
    before = {each: each.read_text() for each in tmp_path.iterdir()}
    (tmp_path / "speed.md").write_text("")
    _run("benchmarks.speed", "--again", "--write", str(tmp_path))
    assert {each: each.read_text() for each in tmp_path.iterdir()} == before


def _run(*command: str) -> None:
    subprocess.run(
        [sys.executable, "-m", *command], check=True, cwd=ROOT, stdout=subprocess.DEVNULL
    )


def _each_tool_is_in_each_table(document: str) -> None:
    tables = re.findall(r"(?:^\|.*\|\n)+", document, re.MULTILINE)
    assert len(tables) == 14
    for table in tables:
        first, *rows = [line.split(" | ") for line in table.splitlines()]
        assert len(rows) > 1
        assert all(len(row) == len(first) and all(row) for row in rows)
    for tool in ("hand-written", "**asgi-dbsession**", "`Depends`, handlers commit"):
        assert sum(f"\n| {tool} |" in table for table in tables) >= 8


def _readers_can_repeat_it(document: str) -> None:
    assert "`python -m benchmarks.speed --quick`" in document
    assert re.search(r"Load average \d+\.\d before and \d+\.\d after", document)
    for name in ("Python", "sqlalchemy", "fastapi", "PostgreSQL"):
        assert re.search(rf"{name} \d+\.\d+", document)


def _the_picture_has_each_tool(picture: str) -> None:
    words = {each.text for each in ET.fromstring(picture).iter() if each.text}
    assert words >= {"hand-written", "asgi-dbsession", "one SELECT", "slow readers"}
    assert "prefers-color-scheme: dark" in picture


def test_memory_is_measured_and_nothing_is_left_behind() -> None:
    """The short form of `python -m benchmarks.memory`: a figure for each way, and zeros."""
    short = ("--clients", "8", "--requests", "40", "--sizes", "10")
    command = [sys.executable, "-m", "benchmarks.memory", *short]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=True
    )
    streaming, abandoned = done.stdout.strip().split("\n\n")
    for way in ("without the middleware", "with the middleware", "with `attempts=3`"):
        assert re.search(rf"^\| {way} \| [\d.-]+ \|$", streaming, re.MULTILINE)
    rows = abandoned.splitlines()[2:]
    assert len(rows) == 5
    assert all(each.endswith("| 0 | 0 | 0 |") for each in rows)


def test_the_garbage_collector_is_measured() -> None:
    """The short form of `python -m benchmarks.garbage`: a figure for each tool."""
    short = ("--rounds", "1", "--seconds", "0.2", "--clients", "5", "--thresholds", "700")
    command = [sys.executable, "-m", "benchmarks.garbage", *short]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    _, *tools = done.stdout.splitlines()
    assert [re.sub(r"[1-9][\d,]* at", "N at", each.partition(":")[2]) for each in tools] == [
        " N at 700"
    ] * 3


def test_a_slow_reader_who_has_waited_does_not_hurry() -> None:
    """Otherwise, a server that lets readers wait is measured as fast as one that does not."""

    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(1.5)
        writer.write(bytes(400_000))

    async def read() -> float:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port: int = server.sockets[0].getsockname()[1]
        (rate,) = await read_slowly(port, 1, coming=1, seconds=1)
        server.close()
        return rate

    assert 0 < asyncio.run(read()) < 0.3


def test_a_measured_server_has_no_listeners_on_its_pool() -> None:
    """With such listeners, this package ends a read in a task, and would seem slower than it is."""
    pool = create_engine("sqlite://", poolclass=QueuePool).pool
    door = Door(app=None, pool=lambda: pool)

    async def measure() -> None:
        door.measure()

    asyncio.run(measure())
    assert len(pool.dispatch.checkout) == len(pool.dispatch.checkin) == 0
