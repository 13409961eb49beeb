"""Tests the example in process, as a program on a socket, and in a real browser."""

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
from datetime import UTC, date, datetime, timedelta
from functools import cache
from importlib import import_module
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
from sqlalchemy import URL, create_engine, delete, func, insert, select, text
from sqlalchemy.pool import NullPool
from starlette.applications import Starlette
from starlette.testclient import TestClient

from example_app.databases import describe_database
from example_app.models import Mail, Order, Payment, Product, ReportBase, Sale, ShopBase
from example_app.shop import SHELF

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
    """The stored rows, which every connection sees."""

    stock: dict[str, int]
    orders: int = 0
    payments: int = 0
    mails: int = 0
    sales: int = 0
    packed: int = 0


def after(orders: int, **stock: int) -> Stored:
    """Return the expected rows after so many orders with packed parcels."""
    counts = dict.fromkeys(("orders", "payments", "mails", "sales", "packed"), orders)
    return Stored(FULL_SHELF | stock, **counts)


UNTOUCHED = Stored(FULL_SHELF)


@dataclass
class Books:
    """The databases of a shop, and other connections that read them."""

    shop: URL
    reports: URL

    @property
    def variables(self) -> dict[str, str]:
        """Return the environment variables for these databases; none for the default databases."""
        if self.shop.drivername == "sqlite":
            return {}
        return {
            "DATABASE_URL": self.shop.render_as_string(hide_password=False),
            "REPORT_DATABASE_URL": self.reports.render_as_string(hide_password=False),
        }

    @contextmanager
    def connect(self, url: URL | None = None) -> Iterator[Any]:
        """Open a connection to the shop's database, separate from the shop's own connections."""
        url = url or self.shop
        driver = "sqlite" if url.drivername == "sqlite" else "postgresql+psycopg"
        engine = create_engine(url.set(drivername=driver), poolclass=NullPool)
        with engine.begin() as connection:
            yield connection

    def empty(self) -> None:
        """Delete all rows of a running shop, and fill its shelf again."""
        for url, base in ((self.shop, ShopBase), (self.reports, ReportBase)):
            with self.connect(url) as connection:
                tables = reversed(base.metadata.sorted_tables)
                if url.drivername == "sqlite":
                    for table in tables:
                        connection.execute(delete(table))
                else:
                    names = ", ".join(table.name for table in tables)
                    connection.execute(text(f"TRUNCATE {names} RESTART IDENTITY"))
        with self.connect() as connection:
            for name, price, stock in SHELF:
                connection.execute(insert(Product).values(name=name, price=price, stock=stock))

    def read(self) -> Stored:
        """Read all tables."""
        with self.connect() as connection, self.connect(self.reports) as other:
            stock = {
                str(name): int(stock)
                for name, stock in connection.execute(select(Product.name, Product.stock))
            }
            packed = int(connection.scalar(select(func.count()).where(Order.packed)))
            orders, payments, mails, sales = (
                int(each.scalar(select(func.count()).select_from(table)))
                for each, table in (
                    (connection, Order),
                    (connection, Payment),
                    (connection, Mail),
                    (other, Sale),
                )
            )
        return Stored(stock, orders, payments, mails, sales, packed)


@dataclass
class Shop:
    """A running shop: a client, and its databases."""

    client: Any
    books: Books

    def order(self, product: int = TEAPOT, quantity: object = 1, **fields: object) -> Any:
        """Order with JSON, as a program does."""
        wish = {"product": product, "quantity": quantity, "card": "approved"} | fields
        return self.client.post("/api/orders", json=wish)

    def send_form(self, product: int = TEAPOT, quantity: object = 1, **fields: object) -> Any:
        """Order as a browser without JavaScript does, but do not follow the redirect."""
        wish = {"product": product, "quantity": quantity, "card": "approved"} | fields
        return self.client.post("/orders", data=wish, follow_redirects=False)


# A database on a server, made once.
database_named = cache(postgres.new_database)


def make_books(kind: str, folder: Path, name: str) -> Books:
    """Make two empty databases of a kind; PostgreSQL uses one for both."""
    if kind == "sqlite":
        files = (folder / "shop.db", folder / "reports.db")
        return Books(*(URL.create("sqlite", database=str(file)) for file in files))
    url = database_named(name)
    books = Books(url, url)
    with books.connect() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE; CREATE SCHEMA public"))
    return books


@pytest.fixture(params=["sqlite", "postgresql"])
def books(request: pytest.FixtureRequest, tmp_path: Path) -> Books:
    """Make two empty databases of each kind."""
    return make_books(request.param, tmp_path, "example")


# What is refused before a database is used, and what a browser does with an answer, is the same
# with each database.
one_database = pytest.mark.parametrize("books", ["sqlite"], indirect=True)
one_running_shop = pytest.mark.parametrize("shared_program", ["postgresql"], indirect=True)


@cache
def import_shop(**variables: str) -> dict[str, Any]:
    """Import the modules of the shop again in this environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DATABASE_URL", "REPORT_DATABASE_URL"):
            patch.delenv(name, raising=False)
        for name, value in variables.items():
            patch.setenv(name, value)
        for name in [name for name in sys.modules if name.partition(".")[0] == "example_app"]:
            patch.delitem(sys.modules, name)
        return vars(import_module("example_app.databases")) | vars(import_module("example_app.app"))


@pytest.fixture
def application(books: Books, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Starlette:
    """The shop with these databases."""
    monkeypatch.chdir(tmp_path)
    app: Starlette = import_shop(**books.variables)["app"]
    return app


@pytest.fixture
def shop(application: Starlette, books: Books) -> Iterator[Shop]:
    """The running shop, in process."""
    with TestClient(application, raise_server_exceptions=False) as client:
        yield Shop(client, books)


def eventually(condition: Callable[[], object], seconds: float = 20) -> None:
    """Wait until something happens; fail if it never happens."""
    deadline = monotonic() + seconds
    while not condition():
        assert monotonic() < deadline, "it never became true"
        Event().wait(0.02)


def test_an_order_takes_the_stock_is_paid_counted_confirmed_and_packed(shop: Shop) -> None:
    """All is stored together. The mail follows COMMIT, and the parcel follows the response."""
    response = shop.order(TEAPOT, 2)
    assert response.status_code == 201
    assert response.json() == {
        "id": 1,
        "product": "Teapot",
        "quantity": 2,
        "total": 7800,
        "packed": False,
    }
    assert shop.books.read() == after(1, Teapot=10)
    assert shop.client.get("/api/orders").json() == [response.json() | {"packed": True}]
    assert shop.client.get("/api/mails").json() == ["Thank you for order 1: 2 of Teapot."]


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
    """The work before the payment is rolled back, and no mail is sent."""
    response = send(shop, **wish)
    assert response.status_code == status
    assert message in response.text
    assert shop.books.read() == UNTOUCHED
    assert shop.client.get("/api/mails").json() == []
    assert shop.order().status_code == 201


def test_an_order_that_the_reports_refuse_changes_nothing(shop: Shop) -> None:
    """Both databases are flushed before the first COMMIT."""
    with shop.books.connect(shop.books.reports) as connection:
        connection.execute(text("ALTER TABLE sale RENAME TO lost"))
    assert shop.order().status_code == 500
    with shop.books.connect(shop.books.reports) as connection:
        connection.execute(text("ALTER TABLE lost RENAME TO sale"))
    assert shop.books.read() == UNTOUCHED
    assert shop.order().status_code == 201


def test_the_report_adds_up(shop: Shop) -> None:
    """The report has one line for each product and day, newest day first."""
    yesterday = datetime.now(UTC).date() - timedelta(days=1)
    with shop.books.connect(shop.books.reports) as connection:
        row = {"day": yesterday, "product": "Cup", "quantity": 9, "total": 8550}
        connection.execute(insert(Sale).values(row))
    for product, quantity, card in (
        (CUP, 1, "approved"),
        (CUP, 1, "declined"),
        (CUP, 2, "approved"),
    ):
        shop.order(product, quantity, card=card)
    shop.order(TEAPOT, 1)
    sales = shop.client.get("/api/sales").json()
    assert [(sale["product"], sale["quantity"], sale["total"]) for sale in sales] == [
        ("Teapot", 1, 3900),
        ("Cup", 3, 2850),
        ("Cup", 9, 8550),
    ]
    assert date.fromisoformat(sales[1]["day"]) > yesterday
    assert sales[2]["day"] == yesterday.isoformat()


def test_each_page_says_what_it_cost_the_databases(shop: Shop) -> None:
    """The header shows the times of both databases."""
    assert 'desc="statements: 4"' in shop.client.get("/").headers["server-timing"]
    assert 'desc="statements: 1"' in shop.client.get("/api/sales").headers["server-timing"]


def test_the_last_one_is_sold_once(shop: Shop) -> None:
    """The next customer gets an error."""
    assert shop.order(BISCUIT).status_code == 201
    assert shop.order(BISCUIT).status_code == 409
    assert shop.books.read().stock["The last biscuit"] == 0


def test_a_form_sent_twice_is_paid_once(shop: Shop) -> None:
    """COMMIT refuses the second payment: the client gets a 409, without a sale and a mail."""
    key = str(uuid4())
    assert shop.send_form(key=key).status_code == 303
    once = shop.books.read()
    for send in (shop.send_form, shop.order):
        response = send(key=key)
        assert response.status_code == 409
        assert "ordered already" in response.text
    assert shop.books.read() == once


@one_database
@pytest.mark.parametrize("wrong", BAD_WISHES.values(), ids=BAD_WISHES)
@pytest.mark.parametrize("send", [Shop.order, Shop.send_form], ids=["json", "form"])
def test_a_wish_that_makes_no_sense_is_refused(
    shop: Shop, send: Callable[..., Any], wrong: dict[str, Any]
) -> None:
    """The client gets a 400 that names the field."""
    response = send(shop, **wrong)
    assert response.status_code == 400
    assert next(iter(wrong)) in response.text
    assert shop.books.read() == UNTOUCHED


@one_database
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"1", b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_refused(shop: Shop, body: bytes) -> None:
    """A wrong input is the client's mistake: 400."""
    response = shop.client.post("/api/orders", content=body)
    assert response.status_code == 400
    assert "JSON" in response.json()["error"]


@one_database
def test_a_form_with_a_file_in_it_is_refused(shop: Shop) -> None:
    """A field of a form may be a file instead of text."""
    response = shop.client.post("/orders", data={"quantity": "1"}, files={"product": b"1"})
    assert response.status_code == 400


@one_database
def test_errors_speak_the_language_of_the_client(shop: Shop) -> None:
    """Paths below `/api/` answer with JSON, all others with a page and a link back."""
    assert shop.client.get("/api/nothing").json() == {"error": "Not Found"}
    page = shop.client.get("/nothing")
    assert page.status_code == 404
    assert 'href="/"' in page.text


def test_the_form_leads_back_to_the_page_with_the_order_on_it(shop: Shop) -> None:
    """After POST and redirect, reloading the page does not order again."""
    response = shop.send_form(CUP, 3)
    assert response.status_code == 303
    assert response.headers["location"] == "/#order-1"
    page = shop.client.get("/").text
    assert 'id="order-1"' in page
    assert "€ 28.50" in page
    assert "packed" in page
    assert "Thank you for order 1" in page


def test_what_is_stored_is_escaped_on_the_page(shop: Shop) -> None:
    """The name is shown as text, and never as HTML."""
    with shop.books.connect() as connection:
        connection.execute(insert(Product).values(name="<b>", price=1, stock=1))
    page = shop.client.get("/").text
    assert "&lt;b&gt;" in page
    assert "<b>" not in page


def test_a_shop_that_opens_again_keeps_its_books(application: Starlette, books: Books) -> None:
    """The shop adds products only if it has none."""
    for _ in range(2):
        with TestClient(application) as client:
            assert Shop(client, books).order().status_code == 201
    assert books.read() == after(2, Teapot=10)


@pytest.mark.anyio
async def test_the_export_streams_all_orders_and_holds_no_connection(
    application: Starlette, books: Books
) -> None:
    """The export reads page by page; while the client reads, no connection is in use."""
    imported = import_shop(**books.variables)
    held: list[int] = []
    async with imported["shop"], imported["reports"]:
        pool: Any = imported["shop"].engine.pool
        async with application.router.lifespan_context(application):
            pass
        with books.connect() as connection:
            rows = [
                {"product_id": CUP, "quantity": 1, "total": number, "packed": False}
                for number in range(250)
            ]
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
    """Foreign keys are checked, readers never wait, writers wait for each other."""
    database = describe_database(f"sqlite:///{tmp_path / 'shop.db'}")
    async with database, database.begin() as session:
        found = [
            await session.scalar(text(f"PRAGMA {pragma}"))
            for pragma in ("foreign_keys", "journal_mode", "busy_timeout")
        ]
    assert found == [1, "wal", 5000]


@dataclass
class Program:
    """`python -m example_app`, running on a free port in a temporary folder."""

    process: "subprocess.Popen[bytes]"
    address: str
    folder: Path
    output: Path

    @property
    def printed(self) -> str:
        """Return the output so far."""
        return self.output.read_text()

    def stop(self) -> int:
        """Press Ctrl-C, and return the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(20)

    def answers(self) -> bool:
        """Return True if the shop answers."""
        assert self.process.poll() is None, self.printed
        try:
            return httpx2.get(self.address, trust_env=False).status_code == 200
        except httpx2.TransportError:
            return False


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def start_program(folder: Path, variables: dict[str, str]) -> Iterator[Program]:
    """Run the shop as in the README, until it answers."""
    port = free_port()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for name in ("DATABASE_URL", "REPORT_DATABASE_URL"):
        environment.pop(name, None)
    output = folder.with_name(f"{folder.name}.txt")
    with (
        output.open("wb") as printed,
        subprocess.Popen(
            [sys.executable, "-m", "example_app", "--port", str(port)],
            cwd=folder,
            env=environment | variables,
            stdout=printed,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            program = Program(process, f"http://127.0.0.1:{port}", folder, output)
            eventually(program.answers)
            yield program
        finally:
            process.kill()


@pytest.fixture
def program(books: Books, tmp_path: Path) -> Iterator[Program]:
    """Run the program with each kind of database; SQLite is its default."""
    with start_program(tmp_path, books.variables) as running:
        yield running


@contextmanager
def connect_to(program: Program, books: Books) -> Iterator[Shop]:
    """Open a connection to the shop behind a real socket."""
    with httpx2.Client(base_url=program.address, trust_env=False, timeout=30) as client:
        yield Shop(client, books)


@pytest.fixture
def real_shop(program: Program, books: Books) -> Iterator[Shop]:
    """The shop behind a real socket."""
    with connect_to(program, books) as shop:
        yield shop


@dataclass
class OpenProgram:
    """A running program that several tests share, and its databases."""

    program: Program
    books: Books


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def shared_program(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OpenProgram]:
    """Run the program once with each kind of database: a start takes longer than most tests."""
    folder = tmp_path_factory.mktemp("program")
    books = make_books(request.param, folder, "example_program")
    with start_program(folder, books.variables) as program:
        yield OpenProgram(program, books)


@pytest.fixture
def open_program(shared_program: OpenProgram) -> OpenProgram:
    """The running program, with a full shelf and no orders."""
    shared_program.books.empty()
    return shared_program


@pytest.fixture
def open_shop(open_program: OpenProgram) -> Iterator[Shop]:
    """The shop of the running program, behind a real socket."""
    with connect_to(open_program.program, open_program.books) as shop:
        yield shop


def test_the_program_says_where_it_is_and_leaves_nothing_behind(
    program: Program, real_shop: Shop
) -> None:
    """After Ctrl-C the exit code is 0, there is no traceback, and all data is in the files."""
    assert real_shop.order().status_code == 201
    eventually(lambda: real_shop.books.read().packed)
    assert program.stop() == 0
    assert f"opens at {program.address}" in program.printed
    assert f"curl {program.address}/api/orders" in program.printed
    assert "Traceback" not in program.printed
    files = set() if real_shop.books.variables else {"shop.db", "reports.db"}
    assert {each.name for each in program.folder.iterdir()} == files
    assert real_shop.books.read() == after(1, Teapot=11)


def test_on_a_real_socket_failures_change_nothing(
    open_program: OpenProgram, open_shop: Shop
) -> None:
    """The log shows the crash; the client does not see it."""
    crash = "The payment provider hung up."
    crashes = open_program.program.printed.count(crash)
    assert open_shop.order(card="declined").status_code == 402
    assert open_shop.order(quantity=999).status_code == 409
    response = open_shop.send_form(card="crashing")
    assert response.status_code == 500
    assert crash not in response.text
    assert open_shop.books.read() == UNTOUCHED
    eventually(lambda: open_program.program.printed.count(crash) > crashes)


def test_a_crowd_gets_what_there_is_and_no_more(open_shop: Shop) -> None:
    """Thirty customers order twelve teapots: twelve orders, and eighteen conflicts."""
    with ThreadPoolExecutor(30) as crowd:
        responses = list(crowd.map(lambda _: open_shop.order(), range(30)))
    statuses = sorted(response.status_code for response in responses)
    assert statuses == [201] * 12 + [409] * 18
    eventually(lambda: open_shop.books.read().packed == 12)
    assert open_shop.books.read() == after(12, Teapot=0)


def test_what_the_client_was_told_survives_a_kill(program: Program, real_shop: Shop) -> None:
    """Order and sale are stored before the 201 is sent, so the process may die at once."""
    assert real_shop.order().status_code == 201
    program.process.kill()
    program.process.wait(20)
    stored = real_shop.books.read()
    assert (stored.orders, stored.payments, stored.sales, stored.stock["Teapot"]) == (1, 1, 1, 11)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """A real Chromium without a window; required in CI, optional elsewhere."""
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
        """Open the page."""
        self.browser.get(self.address)

    def order(self, product: str, quantity: int, card: str) -> None:
        """Fill in the form by its labels, and send it."""
        form = self.browser.find_element(By.CSS_SELECTOR, "form[action='/orders']")
        Select(self.labelled(form, "Product", "select")).select_by_visible_text(product)
        number = self.labelled(form, "Quantity", "input")
        number.clear()
        number.send_keys(str(quantity))
        self.labelled(form, card, "input").click()
        form.find_element(By.TAG_NAME, "button").click()

    def labelled(self, form: Any, label: str, kind: str) -> Any:
        """Find a field of the form by its label."""
        return form.find_element(By.XPATH, f".//label[contains(., '{label}')]//{kind}")

    def table(self, heading: str) -> list[list[str]]:
        """Return the rows below a heading."""
        rows = self.browser.find_elements(
            By.XPATH, f"//section[.//h2[. = '{heading}']]//tbody/tr[th]"
        )
        return [[cell.text for cell in row.find_elements(By.XPATH, "./th | ./td")] for row in rows]

    def mails(self) -> list[str]:
        """Return the sent mails."""
        found = self.browser.find_elements(By.XPATH, "//section[.//h2[. = 'Mails sent']]//li")
        return [each.text for each in found]

    def loaded(self) -> Any:
        """Return the timing that the browser received, as in its network panel."""
        script = "return performance.getEntriesByType('navigation')[0].toJSON()"
        return self.browser.execute_script(script)


@pytest.fixture
def page(browser: webdriver.Chrome, open_program: OpenProgram) -> Page:
    """The page, open in the browser."""
    page = Page(browser, open_program.program.address)
    page.open()
    return page


@pytest.mark.parametrize("card", ["approved", "busy"])
def test_in_a_browser_an_order_appears_and_the_stock_goes_down(
    page: Page, open_program: OpenProgram, card: str
) -> None:
    """Sale and mail are stored once, also by a second attempt; the parcel is packed."""
    page.order("Teapot", 2, card)
    eventually(lambda: "/#order-" in page.browser.current_url)
    number = page.browser.current_url.partition("/#order-")[2]  # PostgreSQL leaves gaps
    assert page.table("On the shelf")[0] == ["Teapot", "€ 39.00", "10"]
    assert page.table("Latest orders")[0][:4] == [number, "Teapot", "2", "€ 78.00"]
    assert [row[1:] for row in page.table("Sales per day")] == [["Teapot", "2", "€ 78.00"]]
    assert page.mails() == [f"Thank you for order {number}: 2 of Teapot."]
    eventually(lambda: open_program.books.read().packed)
    page.open()
    assert page.table("Latest orders") == [[number, "Teapot", "2", "€ 78.00", "packed"]]
    assert open_program.books.read() == after(1, Teapot=10)


@one_running_shop
def test_a_browser_shows_what_the_page_cost_the_databases(page: Page) -> None:
    """The network panel shows the working time and the waiting time of the databases."""
    work, wait = page.loaded()["serverTiming"]
    assert (work["name"], work["description"], wait["name"]) == ("db", "statements: 4", "db_wait")
    assert work["duration"] > 0


@one_running_shop
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
    page: Page, open_program: OpenProgram, order: tuple[str, int, str], status: int, message: str
) -> None:
    """The customer reads the reason, goes back, and finds the same stock and no order."""
    shelf = page.table("On the shelf")
    page.order(*order)
    eventually(lambda: page.browser.current_url.endswith("/orders"))
    assert page.loaded()["responseStatus"] == status
    assert page.browser.find_element(By.TAG_NAME, "h1").text == message
    page.browser.find_element(By.LINK_TEXT, "Back to the shop").click()
    eventually(lambda: page.browser.current_url.endswith("/"))
    assert page.table("On the shelf") == shelf
    assert page.table("Latest orders") == page.table("Sales per day") == []
    assert page.mails() == []
    assert open_program.books.read() == UNTOUCHED
