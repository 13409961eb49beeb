"""Tests the live page in a real browser, with and without JavaScript."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import httpx2
import pytest
import uvicorn
from machine import program
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from asgi_dbsession import AsyncDatabase, DBSessionMiddleware, get_session
from asgi_dbsession.live import LivePage

released = threading.Event()


async def hold(_request: Request) -> Response:
    await get_session().execute(text("SELECT 1"))
    while not released.is_set():
        await asyncio.sleep(0.02)
    return PlainTextResponse("held")


async def quick(_request: Request) -> Response:
    await get_session().execute(text("SELECT 1"))
    return PlainTextResponse("quick")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An application with a page, behind a real server."""
    file = tmp_path_factory.mktemp("live") / "live.db"
    database = AsyncDatabase(f"sqlite+aiosqlite:///{file}", pool_size=3, max_overflow=0)
    app = Starlette(routes=[Route("/hold", hold), Route("/quick", quick)])
    app.mount("/db", LivePage(database))
    app.add_middleware(DBSessionMiddleware, database)
    config = uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    serving = threading.Thread(target=server.run)
    serving.start()
    eventually(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    serving.join()


@pytest.fixture(scope="module", params=["with JavaScript", "without"])
def browser(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A browser with scripts, and a browser without."""
    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium")
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"):
        options.add_argument(f"--{argument}")
    if request.param == "without":
        content = {"profile.managed_default_content_settings.javascript": 2}
        options.add_experimental_option("prefs", content)
    found: Any = webdriver.Chrome(options=options, service=Service(program("chromedriver")))
    found.has_scripts = request.param != "without"
    yield found
    with suppress(Exception):
        found.quit()


def eventually(condition: Any, seconds: float = 15) -> None:
    """Wait until something happens; fail if it never happens."""
    deadline = monotonic() + seconds
    while not condition():
        assert monotonic() < deadline, "it never became true"
        threading.Event().wait(0.05)


@contextmanager
def holding(address: str) -> Iterator[None]:
    """Let a request hold a connection inside the block."""
    released.clear()
    asking = threading.Thread(target=httpx2.get, args=(f"{address}/hold",), kwargs={"timeout": 60})
    asking.start()
    try:
        yield
    finally:
        released.set()
        asking.join()


def text_of(browser: Any, place: str) -> str:
    """Return the visible text of an element; empty while the page is reloaded."""
    with suppress(Exception):
        return str(browser.find_element(By.ID, place).text)
    return ""


def line_of(function: str) -> int:
    """Return the line of the statement in a function of this module."""
    lines = Path(__file__).read_text().splitlines()
    return (
        next(n for n, each in enumerate(lines, 1) if each.startswith(f"async def {function}(")) + 1
    )


def test_it_moves_by_itself(browser: Any, address: str) -> None:
    """A request that holds a connection appears with its line, and later disappears."""
    browser.get(f"{address}/db")
    assert "Nobody waits" in text_of(browser, "now")
    name = f"{Path(__file__).name}:{line_of('hold')}"
    with holding(address):
        eventually(lambda: "GET /hold" in text_of(browser, "now"))
        eventually(lambda: name in text_of(browser, "findings").replace("\n", ""))
        eventually(lambda: "keeps 1 connection idle now" in text_of(browser, "findings"))
    eventually(lambda: "GET /hold" not in text_of(browser, "now"))
    eventually(lambda: "GET /hold" in text_of(browser, "recent"))


def test_the_browser_refuses_nothing_and_asks_nobody_else(browser: Any, address: str) -> None:
    """The policy allows everything that the page does, and nothing is loaded from elsewhere."""
    browser.get(f"{address}/db/")
    eventually(
        lambda: "GET" in text_of(browser, "recent") or "No unit" in text_of(browser, "recent")
    )
    complaints = [each for each in browser.get_log("browser") if "favicon" not in each["message"]]
    assert complaints == []
    if browser.has_scripts:
        loaded = browser.execute_script(
            "return performance.getEntriesByType('resource').map(each => each.name)"
        )
        assert [each for each in loaded if not each.startswith(f"{address}/db")] == []


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_it_fits_the_window_and_does_not_jump(browser: Any, address: str, width: int) -> None:
    """No element is wider than the window, and all rows have the same height."""
    if not browser.has_scripts:
        pytest.skip("asked with a script")
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    httpx2.get(f"{address}/quick")
    browser.get(f"{address}/db/")
    height = "return document.getElementById('now').getBoundingClientRect().height"
    before = browser.execute_script(height)
    with holding(address):
        eventually(lambda: "GET /hold" in text_of(browser, "now"))
        assert browser.execute_script(height) == before
        wide = "return document.documentElement.scrollWidth"
        assert browser.execute_script(wide) <= width


def test_a_keyboard_pauses_it(browser: Any, address: str) -> None:
    """Tab goes to the button first; after a click, the page does not change."""
    if not browser.has_scripts:
        pytest.skip("the button needs a script")
    browser.get(f"{address}/db/")
    browser.switch_to.active_element.send_keys(Keys.TAB)
    button = browser.switch_to.active_element
    assert button.text == "Pause"
    button.send_keys(Keys.SPACE)
    assert (button.text, button.get_attribute("aria-pressed")) == ("Go on", "true")
    shown = text_of(browser, "now")
    with holding(address):
        threading.Event().wait(2)
        assert text_of(browser, "now") == shown
        button.send_keys(Keys.SPACE)
        eventually(lambda: "GET /hold" in text_of(browser, "now"))


def test_a_screen_reader_finds_its_way(browser: Any, address: str) -> None:
    """The page has headings in order, table headers, and one polite status element."""
    browser.get(f"{address}/db/")
    eventually(lambda: "Nobody" in text_of(browser, "now"))
    if not browser.has_scripts:
        return
    headings = browser.execute_script(
        "return [...document.querySelectorAll('h1,h2,h3')].map(each => each.tagName)"
    )
    assert headings[:3] == ["H1", "H2", "H2"]
    script = "return [...document.querySelectorAll('table')].filter(each => !each.tHead)"
    assert browser.execute_script(script) == []
    assert len(browser.find_elements(By.CSS_SELECTOR, "[aria-live=polite]")) == 1
