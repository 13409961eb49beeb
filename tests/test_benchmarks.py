"""Tests the speed measurements in their short form: `python -m benchmarks.speed`."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from benchmarks.speed.clients import read_slowly

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the command in a separate folder, and return what it writes."""
    folder = tmp_path_factory.mktemp("measured")
    command = [sys.executable, "-m", "benchmarks.speed", "--quick", "--write", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return folder


def test_every_tool_that_is_installed_is_measured_in_every_table(written: Path) -> None:
    """No cell is empty, for any figures."""
    text = (written / "speed.md").read_text()
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert len(tables) == 14
    for table in tables:
        first, *rows = [line.split(" | ") for line in table.splitlines()]
        assert len(rows) > 1
        assert all(len(row) == len(first) and all(row) for row in rows)
    for tool in ("hand-written", "**asgi-dbsession**", "`Depends`, handlers commit"):
        assert sum(f"\n| {tool} |" in table for table in tables) >= 8


def test_the_document_says_how_it_was_made(written: Path) -> None:
    """The document shows command, versions and load, so that readers can repeat the measurement."""
    text = (written / "speed.md").read_text()
    assert "`python -m benchmarks.speed --quick`" in text
    assert re.search(r"Load average \d+\.\d before and \d+\.\d after", text)
    for name in ("Python", "sqlalchemy", "fastapi", "PostgreSQL"):
        assert re.search(rf"{name} \d+\.\d+", text)


def test_the_picture_is_one(written: Path) -> None:
    """The picture has a row for each tool, and its own colours in the dark."""
    text = (written / "speed.svg").read_text()
    words = [each.text for each in ET.fromstring(text).iter() if each.text]
    assert {"hand-written", "asgi-dbsession", "one SELECT", "slow readers"} <= set(words)
    assert "prefers-color-scheme: dark" in text


def test_document_and_picture_come_from_the_kept_figures(written: Path) -> None:
    """The document is made from the stored figures, so nothing in it is typed by a person."""
    before = {each: each.read_text() for each in written.iterdir()}
    (written / "speed.md").write_text("")
    command = [sys.executable, "-m", "benchmarks.speed", "--again", "--write", str(written)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    assert {each: each.read_text() for each in written.iterdir()} == before


def test_memory_is_measured_and_nothing_is_left_behind() -> None:
    """The short form of `python -m benchmarks.memory`: a figure for each way, and zeros."""
    command = [sys.executable, "-m", "benchmarks.memory", "--clients", "20", "--requests", "200"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=True
    )
    streaming, abandoned = done.stdout.strip().split("\n\n")
    for way in ("without the middleware", "with the middleware", "with `attempts=3`"):
        assert re.search(rf"^\| {way}( \| [\d.-]+){{3}} \|$", streaming, re.MULTILINE)
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
