"""The promises of the example: in process, as a program on a socket, and in a real browser."""

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from time import monotonic
from typing import Any
from uuid import uuid4

import httpx2
import postgres
import pytest
from asgi import get
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select
from sqlalchemy import URL, create_engine, func, insert, select, text
from sqlalchemy.pool import NullPool
from starlette.applications import Starlette
from starlette.testclient import TestClient

from example_app.app import create_app, describe_database
from example_app.models import Mail, Order, Payment, Product

ROOT = Path(__file__).resolve().parents[1]
FULL_SHELF = {"Teapot": 12, "Cup": 48, "The last biscuit": 1}
TEAPOT, CUP, BISCUIT = 1, 2, 3
BAD_WISHES = {
    "a word": {"quantity": "two"},
    "a fraction": {"quantity": "1.5"},
    "a negative number": {"quantity": -1},
    "nothing at all": {"quantity": 0},
    "too many": {"quantity": 10**30},
    "no number": {"quantity": ""},
    "a product that is no number": {"product": "teapot"},
    "an unknown card": {"card": "gold\0"},
    "a key that is no UUID": {"key": "x\0"},
}


@dataclass(frozen=True)
class Stored:
    """What is really stored, and so visible to everybody."""

    stock: dict[str, int]
    orders: int = 0
    payments: int = 0
    mails: int = 0


UNTOUCHED = Stored(FULL_SHELF)


@dataclass
class Books:
    """The database of a shop, and another connection to read it by."""

    url: URL

    @property
    def address(self) -> str:
        """As `DATABASE_URL` holds it."""
        return self.url.render_as_string(hide_password=False)

    @contextmanager
    def connect(self) -> Iterator[Any]:
        """A connection that has nothing to do with the shop's."""
        driver = "sqlite" if self.url.drivername == "sqlite" else "postgresql+psycopg"
        engine = create_engine(self.url.set(drivername=driver), poolclass=NullPool)
        with engine.begin() as connection:
            yield connection

    def read(self) -> Stored:
        """Read it all."""
        with self.connect() as connection:
            stock = {
                str(name): int(stock)
                for name, stock in connection.execute(select(Product.name, Product.stock))
            }
            counts = [
                int(connection.scalar(select(func.count()).select_from(table)))
                for table in (Order, Payment, Mail)
            ]
        return Stored(stock, *counts)


@dataclass
class Shop:
    """A running shop: a client of it, and its books."""

    client: Any
    books: Books

    def order(self, product: int = TEAPOT, quantity: object = 1, **fields: object) -> Any:
        """Order as a program does."""
        wish = {"product": product, "quantity": quantity, "card": "approved"} | fields
        return self.client.post("/api/orders", json=wish)

    def send_form(self, product: int = TEAPOT, quantity: object = 1, **fields: object) -> Any:
        """Order as a browser without JavaScript does, but stay where it is sent on from."""
        wish = {"product": product, "quantity": quantity, "card": "approved"} | fields
        return self.client.post("/orders", data=wish, follow_redirects=False)


@pytest.fixture(params=["sqlite", "postgresql"])
def books(request: pytest.FixtureRequest, tmp_path: Path) -> Books:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return Books(URL.create("sqlite", database=str(tmp_path / "shop.db")))
    return Books(postgres.new_database("example"))


@pytest.fixture
def application(books: Books) -> Starlette:
    """The shop on that database."""
    return create_app(describe_database(books.address))


@pytest.fixture
def shop(application: Starlette, books: Books) -> Iterator[Shop]:
    """The shop, open, in process."""
    with TestClient(application, raise_server_exceptions=False) as client:
        yield Shop(client, books)


def eventually(condition: Callable[[], object], seconds: float = 20) -> None:
    """Wait for what happens in its own time; fails when it never does."""
    deadline = monotonic() + seconds
    while not condition():
        assert monotonic() < deadline, "it never became true"
        Event().wait(0.02)


def test_an_order_takes_the_stock_is_paid_and_is_confirmed(shop: Shop) -> None:
    """Three functions write in one transaction, and the background task in one of its own."""
    response = shop.order(TEAPOT, 2)
    assert response.status_code == 201
    assert response.json() == {
        "id": 1,
        "product": "Teapot",
        "quantity": 2,
        "total": 7800,
        "confirmed": False,
    }
    assert shop.books.read() == Stored(FULL_SHELF | {"Teapot": 10}, orders=1, payments=1, mails=1)
    assert shop.client.get("/api/orders").json() == [response.json() | {"confirmed": True}]


@pytest.mark.parametrize(
    ("wish", "status", "message"),
    [
        ({"card": "declined"}, 402, "declined"),
        ({"card": "crashing"}, 500, "broke"),
        ({"quantity": 13}, 409, "only 12 left"),
        ({"product": 99}, 404, "no such product"),
    ],
    ids=["declined", "crash", "out-of-stock", "unknown"],
)
@pytest.mark.parametrize("send", [Shop.order, Shop.send_form], ids=["json", "form"])
def test_an_order_that_fails_changes_nothing(
    shop: Shop, send: Callable[..., Any], wish: dict[str, Any], status: int, message: str
) -> None:
    """Although the stock was taken and the order written before the payment failed."""
    response = send(shop, **wish)
    assert response.status_code == status
    assert message in response.text
    assert shop.books.read() == UNTOUCHED
    assert shop.order().status_code == 201


def test_the_last_one_is_sold_once(shop: Shop) -> None:
    """The next customer is told so."""
    assert shop.order(BISCUIT).status_code == 201
    assert shop.order(BISCUIT).status_code == 409
    assert shop.books.read().stock["The last biscuit"] == 0


def test_a_form_sent_twice_is_paid_once(shop: Shop) -> None:
    """COMMIT finds the second one out, and the customer gets a 409 in place of the success."""
    key = str(uuid4())
    assert shop.send_form(key=key).status_code == 303
    once = shop.books.read()
    for send in (shop.send_form, shop.order):
        response = send(key=key)
        assert response.status_code == 409
        assert "ordered already" in response.text
    assert shop.books.read() == once


@pytest.mark.parametrize("wrong", BAD_WISHES.values(), ids=BAD_WISHES)
@pytest.mark.parametrize("send", [Shop.order, Shop.send_form], ids=["json", "form"])
def test_a_wish_that_makes_no_sense_is_refused(
    shop: Shop, send: Callable[..., Any], wrong: dict[str, Any]
) -> None:
    """With a 400 that names the field."""
    response = send(shop, **wrong)
    assert response.status_code == 400
    assert next(iter(wrong)) in response.text
    assert shop.books.read() == UNTOUCHED


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"1", b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_refused(shop: Shop, body: bytes) -> None:
    """It is the fault of whoever sent it: 400."""
    response = shop.client.post("/api/orders", content=body)
    assert response.status_code == 400
    assert "JSON" in response.json()["error"]


def test_a_form_with_a_file_in_it_is_refused(shop: Shop) -> None:
    """Not every part of a form is a text."""
    response = shop.client.post("/orders", data={"quantity": "1"}, files={"product": b"1"})
    assert response.status_code == 400


def test_errors_speak_the_language_of_the_client(shop: Shop) -> None:
    """JSON below `/api/`, a page with a way back everywhere else."""
    assert shop.client.get("/api/nothing").json() == {"error": "Not Found"}
    page = shop.client.get("/nothing")
    assert page.status_code == 404
    assert 'href="/"' in page.text


def test_the_form_leads_back_to_the_page_with_the_order_on_it(shop: Shop) -> None:
    """POST, redirect, GET: reloading the page does not order again."""
    response = shop.send_form(CUP, 3)
    assert response.status_code == 303
    assert response.headers["location"] == "/#order-1"
    page = shop.client.get("/").text
    assert 'id="order-1"' in page
    assert "€ 28.50" in page
    assert "sent" in page


def test_what_is_stored_is_escaped_on_the_page(shop: Shop) -> None:
    """A name is a text, not a piece of the page."""
    with shop.books.connect() as connection:
        connection.execute(insert(Product).values(name="<b>", price=1, stock=1))
    page = shop.client.get("/").text
    assert "&lt;b&gt;" in page
    assert "<b>" not in page


def test_a_shop_that_opens_again_keeps_its_books(books: Books) -> None:
    """Products are put on the shelf only where there are none."""
    for _ in range(2):
        with TestClient(create_app(describe_database(books.address))) as client:
            assert Shop(client, books).order().status_code == 201
    assert books.read() == Stored(FULL_SHELF | {"Teapot": 10}, orders=2, payments=2, mails=2)


@pytest.mark.anyio
async def test_the_export_streams_all_orders_and_holds_no_connection(books: Books) -> None:
    """Page by page; while the client is busy with one, the pool has everything back."""
    database = describe_database(books.address)
    application = create_app(database)
    held: list[int] = []
    async with database:
        pool: Any = database.engine.pool
        async with application.router.lifespan_context(application):
            pass
        with books.connect() as connection:
            rows = [{"product_id": CUP, "quantity": 1, "total": number} for number in range(250)]
            connection.execute(insert(Order), rows)
        exchange = await get(
            application,
            "/orders.csv",
            on_message=lambda _: held.append(pool.checkedout()),
        )
    header, *lines = csv.reader(exchange.body.decode().splitlines())
    assert header == ["order", "product", "quantity", "total"]
    assert lines == [[str(number + 1), "Cup", "1", str(number)] for number in range(250)]
    assert exchange.kinds == ["response.start"] + ["response.body"] * 5
    assert held == [0] * 6


@pytest.mark.anyio
async def test_each_sqlite_connection_is_set_up(tmp_path: Path) -> None:
    """Foreign keys are checked, readers do not wait for writers, writers wait for each other."""
    database = describe_database(f"sqlite:///{tmp_path / 'shop.db'}")
    async with database, database.begin() as session:
        found = [
            await session.scalar(text(f"PRAGMA {pragma}"))
            for pragma in ("foreign_keys", "journal_mode", "busy_timeout")
        ]
    assert found == [1, "wal", 5000]


@dataclass
class Program:
    """`python -m example_app`, running on a port of its own, in a folder of its own."""

    process: "subprocess.Popen[str]"
    address: str
    folder: Path

    def stop(self) -> tuple[int, str]:
        """Press Ctrl-C; the exit code, and all that was printed."""
        self.process.send_signal(signal.SIGINT)
        printed, _ = self.process.communicate(timeout=20)
        return self.process.returncode, printed

    def answers(self) -> bool:
        """Whether the shop is open."""
        assert self.process.poll() is None, self.process.communicate()[0]
        try:
            return httpx2.get(self.address, trust_env=False).status_code == 200
        except httpx2.TransportError:
            return False


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def start_program(folder: Path, database_url: str | None) -> Iterator[Program]:
    """Run the shop as a reader of the README would, until it answers."""
    port = free_port()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("DATABASE_URL", None)
    if database_url is not None:
        environment["DATABASE_URL"] = database_url
    with subprocess.Popen(
        [sys.executable, "-m", "example_app", "--port", str(port)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            program = Program(process, f"http://127.0.0.1:{port}", folder)
            eventually(program.answers)
            yield program
        finally:
            process.kill()


@pytest.fixture
def program(books: Books, tmp_path: Path) -> Iterator[Program]:
    """The program on each kind of database; SQLite is what it takes by itself."""
    own = books.url.drivername == "sqlite"
    with start_program(tmp_path, None if own else books.address) as running:
        yield running


@pytest.fixture
def real_shop(program: Program, books: Books) -> Iterator[Shop]:
    """The shop behind a real socket."""
    with httpx2.Client(base_url=program.address, trust_env=False, timeout=30) as client:
        yield Shop(client, books)


def test_the_program_says_where_it_is_and_leaves_nothing_behind(
    program: Program, real_shop: Shop
) -> None:
    """After Ctrl-C: a success, no traceback, and a database file with everything in it."""
    assert real_shop.order().status_code == 201
    eventually(lambda: real_shop.books.read().mails)
    code, printed = program.stop()
    assert code == 0
    assert f"opens at {program.address}" in printed
    assert f"curl {program.address}/api/orders" in printed
    assert "Traceback" not in printed
    on_sqlite = real_shop.books.url.drivername == "sqlite"
    assert [each.name for each in program.folder.iterdir()] == ["shop.db"] * on_sqlite
    after = Stored(FULL_SHELF | {"Teapot": 11}, orders=1, payments=1, mails=1)
    assert real_shop.books.read() == after


def test_on_a_real_socket_failures_change_nothing(program: Program, real_shop: Shop) -> None:
    """The crash is in the log, and only there."""
    assert real_shop.order(card="declined").status_code == 402
    assert real_shop.order(quantity=999).status_code == 409
    assert real_shop.send_form(card="crashing").status_code == 500
    assert real_shop.books.read() == UNTOUCHED
    code, printed = program.stop()
    assert code == 0
    assert "The payment provider hung up." in printed


def test_a_crowd_gets_what_there_is_and_no_more(real_shop: Shop) -> None:
    """Thirty customers at once, twelve teapots: twelve orders, and eighteen conflicts."""
    with ThreadPoolExecutor(30) as crowd:
        responses = list(crowd.map(lambda _: real_shop.order(), range(30)))
    statuses = sorted(response.status_code for response in responses)
    assert statuses == [201] * 12 + [409] * 18
    eventually(lambda: real_shop.books.read().mails == 12)
    assert real_shop.books.read() == Stored(FULL_SHELF | {"Teapot": 0}, 12, 12, 12)


def test_what_the_client_was_told_survives_a_kill(program: Program, real_shop: Shop) -> None:
    """The order was stored before the 201 left, so the process may die at once."""
    assert real_shop.order().status_code == 201
    program.process.kill()
    program.process.wait(20)
    stored = real_shop.books.read()
    assert (stored.orders, stored.payments, stored.stock["Teapot"]) == (1, 1, 11)


@pytest.fixture
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """A real Chromium that nobody sees; required in CI, optional elsewhere."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        missing = "no chromium and chromedriver are installed"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, Service(chromedriver))
    yield driver
    driver.quit()


@dataclass
class Page:
    """The page of the shop, as a customer sees it."""

    browser: webdriver.Chrome
    address: str

    def open(self) -> None:
        """Go there."""
        self.browser.get(self.address)

    def order(self, product: str, quantity: int, card: str) -> None:
        """Fill in the form, by its labels, and send it."""
        form = self.browser.find_element(By.TAG_NAME, "form")
        Select(self.labelled(form, "Product", "select")).select_by_visible_text(product)
        number = self.labelled(form, "Quantity", "input")
        number.clear()
        number.send_keys(str(quantity))
        self.labelled(form, card, "input").click()
        form.find_element(By.TAG_NAME, "button").click()

    def labelled(self, form: Any, label: str, kind: str) -> Any:
        """A field of the form, by what is written next to it."""
        return form.find_element(By.XPATH, f".//label[contains(., '{label}')]//{kind}")

    def table(self, heading: str) -> list[list[str]]:
        """The rows below a heading."""
        rows = self.browser.find_elements(
            By.XPATH, f"//section[.//h2[. = '{heading}']]//tbody/tr[th]"
        )
        return [[cell.text for cell in row.find_elements(By.XPATH, "./th | ./td")] for row in rows]

    def status(self) -> int:
        """The HTTP status that it came with."""
        script = "return performance.getEntriesByType('navigation')[0].responseStatus"
        return int(self.browser.execute_script(script))


@pytest.fixture
def page(browser: webdriver.Chrome, program: Program) -> Page:
    """The page, open in the browser."""
    page = Page(browser, program.address)
    page.open()
    return page


def test_in_a_browser_an_order_appears_and_the_stock_goes_down(page: Page, books: Books) -> None:
    """And once the page is loaded again, the confirmation has been sent."""
    page.order("Teapot", 2, "approved")
    eventually(lambda: page.browser.current_url.endswith("/#order-1"))
    assert page.table("On the shelf")[0] == ["Teapot", "€ 39.00", "10"]
    assert page.table("Latest orders")[0][:4] == ["1", "Teapot", "2", "€ 78.00"]
    eventually(lambda: books.read().mails)
    page.open()
    assert page.table("Latest orders") == [["1", "Teapot", "2", "€ 78.00", "sent"]]
    assert books.read() == Stored(FULL_SHELF | {"Teapot": 10}, orders=1, payments=1, mails=1)


@pytest.mark.parametrize(
    ("order", "status", "message"),
    [
        (("Teapot", 2, "declined"), 402, "The card was declined."),
        (("Teapot", 2, "crashes"), 500, "Something broke."),
        (("Teapot", 13, "approved"), 409, "Teapot: only 12 left."),
    ],
    ids=["declined", "crash", "out-of-stock"],
)
def test_in_a_browser_an_order_that_fails_leaves_the_page_as_it_was(
    page: Page, books: Books, order: tuple[str, int, str], status: int, message: str
) -> None:
    """The customer reads why, goes back, and finds the same stock and no order."""
    shelf = page.table("On the shelf")
    page.order(*order)
    eventually(lambda: page.browser.current_url.endswith("/orders"))
    assert page.status() == status
    assert page.browser.find_element(By.TAG_NAME, "h1").text == message
    page.browser.find_element(By.LINK_TEXT, "Back to the shop").click()
    eventually(lambda: page.browser.current_url.endswith("/"))
    assert page.table("On the shelf") == shelf
    assert page.table("Latest orders") == []
    assert books.read() == UNTOUCHED
