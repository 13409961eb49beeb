"""Tests reading the site and copying from it, in a real browser."""

import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from machine import program
from pages import Page
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from test_site import SITE, built, site

pytestmark = built
SMALLEST = 11  # pixels


class Quiet(SimpleHTTPRequestHandler):
    """Serves files without a log."""

    def log_message(self, *args: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The site on a local server."""
    site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE)))
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    serving.join()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser that may write to its clipboard."""
    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium")
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"):
        options.add_argument(f"--{argument}")
    found = webdriver.Chrome(options=options, service=Service(program("chromedriver")))
    yield found
    with suppress(Exception):
        found.quit()


def show(browser: Any, url: str, width: int) -> None:
    """Open a page in a window of this width."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    browser.get(url)


@pytest.mark.parametrize("width", [390, 768, 1024, 1280])
@pytest.mark.parametrize(
    "page",
    ["index", "explanation/concepts", "explanation/how-many-connections", "measured/speed"],
)
def test_the_type_of_a_chart_is_large_enough(
    browser: Any, address: str, page: str, width: int
) -> None:
    """On a phone and on a desktop, text has at least 11 pixels, and nothing scrolls sideways."""
    show(browser, f"{address}/{page}.html", width)
    shown, natural, source = browser.execute_async_script(
        "const done = arguments[0], image = document.querySelector('picture img');"
        "image.decode().then(() => done([image.width, image.naturalWidth, image.currentSrc]));"
    )
    drawing = (SITE / source.removeprefix(address + "/")).read_text()
    smallest = min(map(float, re.findall(r"font(?:-size)?: ([\d.]+)px", drawing)))
    (drawn,) = re.findall(r'viewBox="0 0 (\d+)', drawing)
    assert smallest * shown / float(drawn) >= SMALLEST, (shown, natural, source)
    assert shown <= width


def test_the_copy_button_copies_what_can_be_pasted(browser: Any, address: str) -> None:
    """The copied commands of the home page have no prompt and no output."""
    show(browser, f"{address}/index.html", 1280)
    permissions = ["clipboardReadWrite", "clipboardSanitizedWrite"]
    browser.execute_cdp_cmd("Browser.grantPermissions", {"permissions": permissions})
    blocks = browser.find_elements(By.CSS_SELECTOR, "article .highlight")
    (commands,) = [block for block in blocks if "venv" in block.text]
    commands.find_element(By.CSS_SELECTOR, "[data-md-type=copy], .md-clipboard").click()
    copied = browser.execute_async_script(
        "const done = arguments[0];"
        "setTimeout(() => navigator.clipboard.readText().then(done, done), 300);"
    )
    assert str(copied).strip() == Page("README.md").blocks("bash")[0].strip()
