"""Whatever is configured wrong is told in one line, with a cure, and without a password.

What `test_url.py`, `test_misuse.py`, `test_database.py` and `test_middleware.py` say of it is not
said again here.
"""

import threading
import traceback
from asyncio import wait
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from functools import lru_cache, partial, wraps
from inspect import isawaitable
from pathlib import Path
from typing import Any

import pytest
from asgi import Life, get
from conftest import AnyDatabase, becomes_true, real_database
from hypothesis import example, given, strategies as st
from sqlalchemy import URL, create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.pool import QueuePool, StaticPool
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse

from asgi_dbsession import (
    AsyncDatabase,
    ConfigurationError,
    DatabaseUnavailable,
    DBSessionError,
    DBSessionMiddleware,
    SyncDatabase,
)

pytestmark = pytest.mark.anyio

SECRET = "hush-hush"
BOTH = pytest.mark.parametrize("database_class", [AsyncDatabase, SyncDatabase])
IS_NO_URL = "Write `dialect://user:password@host:port/name`"


@pytest.fixture(autouse=True)
def no_secrets_in_logs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level("DEBUG", logger="asgi_dbsession")
    yield
    assert SECRET not in caplog.text


async def nothing(scope: Any, receive: Any, send: Any) -> None:
    """An application that is never called."""


def assert_tells_well(error: BaseException) -> str:
    """Check that the error is one line, and that no traceback would show the password."""
    said = str(error)
    assert said == " ".join(said.split())
    assert SECRET not in "".join(traceback.format_exception(error))
    return said


async def told(use: Callable[[], Awaitable[None] | object]) -> str:
    before = threading.enumerate()
    with pytest.raises((ConfigurationError, DatabaseUnavailable)) as caught:
        await result if isawaitable(result := use()) else None
    # aiosqlite answers to this loop even after a failed connection attempt.
    begun = [each for each in threading.enumerate() if each not in before]
    drivers = [each for each in begun if "_connection_worker_thread" in each.name]
    await becomes_true(lambda: not any(each.is_alive() for each in drivers))
    return assert_tells_well(caught.value)


@BOTH
@pytest.mark.parametrize(
    "url",
    [
        " ",
        f'"postgresql://app:{SECRET}@db/shop"',
        f"'postgresql://app:{SECRET}@db/shop'",
        f"DATABASE_URL=postgresql://app:{SECRET}@db/shop",
        "$DATABASE_URL",
        "sqlite:shop.db",
        "sqlite:/shop.db",
        "shop.db",
        f"jdbc:postgresql://db/shop?password={SECRET}",
        f"postgresql://app:{SECRET}@db:/shop",
        f"postgresql://app:b@/{SECRET}@db/shop",
        f"postgresql://app:b@{SECRET}?@db/shop",
        f"postgresql://app:{SECRET}@db\n/shop",
        f"postgresql://app:{SECRET}@[::1/shop",
    ],
)
async def test_what_only_looks_like_a_url_is_refused(
    database_class: type[AnyDatabase], url: str
) -> None:
    """Examples: quotes from a shell, a line of an `.env` file, the notation of another tool."""
    assert IS_NO_URL in await told(lambda: database_class(url))


@BOTH
async def test_none_is_called_by_its_name(database_class: type[AnyDatabase]) -> None:
    """The value comes from `os.environ.get(…)`, so the user did not write it."""
    url: Any = None
    assert (await told(lambda: database_class(url))).startswith("None is not a database URL.")


@BOTH
@pytest.mark.parametrize(
    ("url", "user", "name"),
    [
        ("postgresql://app@shop:pw@db/shop", "app@shop", "shop"),
        ("postgresql://app:p%40ss@db/shop", "app", "shop"),
        ("sqlite:////srv/a@b/c@d.db", None, "/srv/a@b/c@d.db"),
    ],
)
def test_an_at_sign_that_can_only_mean_itself_is_fine(
    database_class: type[AnyDatabase], url: str, user: str | None, name: str
) -> None:
    """A percent sign may be in a user name (as on Azure), encoded, or in the path of a file."""
    read = database_class(url).url
    assert (read.username, read.database) == (user, name)


@BOTH
@pytest.mark.parametrize("dialect", ["postgresql+asyncpg+x", "postgresql+", "psql", "Postgresql"])
async def test_a_dialect_with_a_typing_error_is_refused(
    database_class: type[AnyDatabase], dialect: str
) -> None:
    """The error shows the given name, because it is nearly right."""
    said = await told(lambda: database_class(f"{dialect}://app:{SECRET}@db/shop"))
    assert f"{dialect}://app:***@db/shop. Check the part before `://`" in said


@BOTH
async def test_space_around_a_url_is_ignored(
    database_class: type[AnyDatabase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A secret file ends with a line break, which SQLite would make part of the file name."""
    monkeypatch.setenv("SHOP", " sqlite:///shop.db\r\n")
    assert database_class.from_env("SHOP").url.database == "shop.db"


@BOTH
@pytest.mark.parametrize("variable", [None, 1, f"postgresql://app:{SECRET}@db/shop"])
async def test_a_url_is_no_name_of_a_variable(
    database_class: type[AnyDatabase], variable: Any
) -> None:
    """A URL must be given to the class itself, and the error does not show it."""
    said = await told(lambda: database_class.from_env(variable))
    if isinstance(variable, str):
        assert said.endswith(f"and this is a URL. Write `{database_class.__name__}(url)`.")
    else:
        assert said.endswith(f"or give {database_class.__name__} the URL itself.")


@BOTH
@pytest.mark.parametrize("kind", ["AsyncDatabase", "SyncDatabase"])
async def test_an_engine_is_told_from_engine(database_class: type[AnyDatabase], kind: str) -> None:
    """The cure names the class that fits the engine, not the class that was called."""
    is_async = kind == "AsyncDatabase"
    engine: Any = (
        create_async_engine("sqlite+aiosqlite://") if is_async else create_engine("sqlite://")
    )
    said = await told(lambda: database_class(engine))
    assert said.startswith("This is an engine, not a database URL.")
    assert f"Write `{kind}.from_engine(engine)`" in said


@BOTH
@pytest.mark.parametrize(
    ("options", "cure"),
    [
        ({"autocommit_reads": True}, "or write `{0}(url, autocommit_reads=…)`"),
        ({"pool_size": 3, "echo": True}, "Set options of the engine in `create_{1}engine`"),
        ({"expire_on_commit": True}, 'Write `session_options={{"expire_on_commit": True}}`'),
    ],
)
async def test_an_option_that_from_engine_does_not_take_is_told(
    database_class: type[AnyDatabase], options: dict[str, Any], cure: str
) -> None:
    """The engine is finished, so its options come too late."""
    async with database_class("sqlite://") as database:
        make: Any = database_class.from_engine
        said = await told(lambda: make(database.engine, **options))
    prefix = "async_" if database_class is AsyncDatabase else ""
    assert cure.format(database_class.__name__, prefix) in said


@BOTH
@pytest.mark.parametrize(
    ("options", "cure"),
    [
        ({"expire_on_commit": True}, 'Write `session_options={"expire_on_commit": True}`.'),
        (
            {"info": {"password": SECRET}, "autoflush": False},
            'Write `session_options={"autoflush": False, "info": …}`.',
        ),
        ({"class_": AsyncSession}, 'Write `session_options={"class_": …}`.'),
    ],
)
async def test_an_option_of_the_session_is_told_where_it_belongs(
    database_class: type[AnyDatabase], options: dict[str, Any], cure: str
) -> None:
    """The error comes when the database is described, not at startup."""
    said = await told(lambda: database_class("sqlite://", **options))
    assert said.endswith(f"but the session does. {cure}")


@BOTH
async def test_execution_options_belong_to_the_engine_too(
    database_class: type[AnyDatabase],
) -> None:
    """Both the engine and the session have an option of this name."""
    options = {"schema_translate_map": {None: "main"}}
    async with database_class("sqlite://", execution_options=options) as database:
        assert database.engine.get_execution_options() == options


@pytest.mark.parametrize("value", [" ", '"sqlite:///shop.db"', f"db:{SECRET}"])
async def test_an_environment_that_is_wrong_is_told(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The middleware reads the environment variable in the same way."""
    monkeypatch.setenv("DATABASE_URL", value)
    app: Any = DBSessionMiddleware(nothing)
    assert IS_NO_URL in await told(lambda: app({"type": "http"}, None, None))


@BOTH
@pytest.mark.parametrize(
    ("value", "cure"),
    [
        (f"app:{SECRET}@db/shop", IS_NO_URL),
        (f"postgresql://app:p@{SECRET}@db/shop", IS_NO_URL),
        (f"nosuch://app:{SECRET}@db/shop", "Check the part before `://`"),
    ],
)
async def test_a_wrong_url_in_a_variable_is_told_with_the_name_of_the_variable(
    database_class: type[AnyDatabase], value: str, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An application may read several variables, and only one of them is wrong."""
    monkeypatch.setenv("SHOP_URL", value)
    said = await told(lambda: database_class.from_env("SHOP_URL"))
    assert said.startswith("Wrong value of SHOP_URL: ")
    assert cure in said


async def test_a_driver_of_the_other_kind_in_a_variable_is_told_with_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cure of the error stays."""
    monkeypatch.setenv("SHOP_URL", "sqlite+pysqlite:///shop.db")
    said = await told(lambda: AsyncDatabase.from_env("SHOP_URL"))
    assert said.startswith("Wrong value of SHOP_URL: ")
    assert said.endswith("Use aiosqlite, or a SyncDatabase.")


def refused(*given: Any, **options: Any) -> str:
    """The error that the middleware raises without an event loop, as in a module."""
    with pytest.raises(ConfigurationError) as caught:
        DBSessionMiddleware(*given, **options)
    return assert_tells_well(caught.value)


@pytest.mark.parametrize("number", [0, -1, True, SECRET, 1.5, [1], None])
@pytest.mark.parametrize("option", ["attempts", "retry_after"])
def test_a_number_that_is_none_is_refused(option: str, number: Any) -> None:
    """True would mean one attempt, and `Retry-After: True`; a text value is not shown."""
    if (option, number) != ("retry_after", None):
        said = refused(nothing, "sqlite://", **{option: number})
        is_number = type(number) is int
        wrong = number if is_number else f"something of type {type(number).__name__}"
        assert said == f"{option} takes a whole number, 1 or more, not {wrong}."


@pytest.mark.parametrize("option", ["commit_when", "on_commit_error", "on_report"])
@pytest.mark.parametrize("wrong", [SECRET, 400, nothing], ids=["text", "number", "coroutine"])
def test_what_is_no_plain_function_is_refused(option: str, wrong: Any) -> None:
    """The error comes when the application is built, not at the first response."""
    said = refused(nothing, "sqlite://", **{option: wrong})
    assert said.startswith(f"{option} takes a plain function, ")
    assert ("`def`, not `async def`" in said) == (wrong is nothing)


def of_nothing() -> None:
    """A function that cannot get the error, the report or the scope."""


def of_two(first: Any, second: Any) -> None:
    """A function that needs more than it gets."""


def by_keyword(*, error: Any) -> None:
    """A function that takes its argument by name only."""


@pytest.mark.parametrize(
    ("option", "cure"),
    [
        ("on_commit_error", "Write `def on_commit_error(error)`."),
        ("on_report", "Write `def on_report(report)`."),
        ("read_only", "Write `def read_only(scope)`."),
        ("on_engine", "Write `def on_engine(engine)`."),
    ],
)
@pytest.mark.parametrize(
    "wrong", [of_nothing, of_two, by_keyword, partial(of_two, 1, 2), PlainTextResponse("sorry")]
)
def test_a_function_that_cannot_get_its_argument_is_refused(
    option: str, cure: str, wrong: Any
) -> None:
    """Otherwise, the mistake would be noticed only when the first COMMIT fails."""
    if option == "on_engine":
        with pytest.raises(ConfigurationError) as caught:
            AsyncDatabase("sqlite://", on_engine=wrong)
        said = assert_tells_well(caught.value)
    else:
        said = refused(nothing, "sqlite://", **{option: wrong})
    assert said == f"{option} takes a plain function with one parameter. {cure}"


class Takes:
    """Objects that can be called with one argument."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def __call__(self, value: Any) -> None: ...

    def method(self, value: Any, more: int = 0) -> None: ...

    @staticmethod
    def static(value: Any) -> None: ...

    @classmethod
    def of_class(cls, value: Any) -> None: ...


class Sorry(PlainTextResponse):
    """A response that is made from the error."""


def with_more(function: Callable[[Any, Any], None]) -> Callable[[Any], None]:
    """Make a function of one argument, which says that it wraps a function of two."""

    @wraps(function)
    def call(value: Any) -> None:
        function(value, None)

    return call


@pytest.mark.parametrize("option", ["on_commit_error", "on_report", "read_only", "on_engine"])
@pytest.mark.parametrize(
    "function",
    [
        Takes,
        Takes(),
        Takes().method,
        Takes.static,
        Takes.of_class,
        vars(Takes)["static"],
        Sorry,
        str,
        int,
        print,
        [].append,
        {}.get,
        partial(of_two, 1),
        partial(of_two, second=2),
        lambda *values: None,
        lambda value, more=None: None,
        with_more(of_two),
        lru_cache(Takes.static),
    ],
)
def test_a_function_that_can_get_its_argument_is_accepted(option: str, function: Any) -> None:
    """Python cannot tell the parameters of some builtin functions, and those are accepted too."""
    if option == "on_engine":
        AsyncDatabase("sqlite://", on_engine=function)
    else:
        middleware = DBSessionMiddleware(nothing, "sqlite://", **{option: function})
        assert middleware.databases


NO_FLAGS = pytest.mark.parametrize("wrong", [SECRET, "no", "", 1, 0, None], ids=repr)


@NO_FLAGS
def test_two_phase_takes_true_or_false(wrong: Any) -> None:
    """A text such as "no", from the environment, would count as true."""
    said = refused(nothing, "sqlite://", two_phase=wrong)
    assert said == f"two_phase takes True or False, not something of type {type(wrong).__name__}."


@BOTH
@NO_FLAGS
async def test_ping_on_startup_takes_true_or_false(
    database_class: type[AnyDatabase], wrong: Any
) -> None:
    """The same, and also for an engine of the application."""
    made: Any = database_class
    cure = "ping_on_startup takes True or False, not something of type "
    assert cure in await told(lambda: made("sqlite://", ping_on_startup=wrong))
    async with made("sqlite://") as database:
        engine = database.engine
        assert cure in await told(lambda: made.from_engine(engine, ping_on_startup=wrong))


@BOTH
@NO_FLAGS
@pytest.mark.parametrize("option", ["join", "read_only"])
async def test_begin_takes_true_or_false(
    database_class: type[AnyDatabase], option: str, wrong: Any
) -> None:
    """The code of the block never runs, and no connection is held."""
    async with database_class("sqlite://") as database:

        async def work() -> None:
            begin: Any = database.begin
            if isinstance(database, AsyncDatabase):
                async with begin(**{option: wrong}):
                    pytest.fail("it went on")
            with begin(**{option: wrong}):
                pytest.fail("it went on")

        assert f"{option} takes True or False, not something of type" in await told(work)
        pool: Any = database.engine.pool
        assert pool.checkedout() == 0


@BOTH
@pytest.mark.parametrize("wrong", [-1, float("nan"), SECRET, True, None], ids=repr)
async def test_a_time_limit_of_a_health_check_is_a_number(
    database_class: type[AnyDatabase], wrong: Any
) -> None:
    """The result would say that the database does not answer, whatever it does."""
    async with database_class("sqlite://") as database:
        said = await told(lambda: database.health(within=wrong))
        assert said.startswith("within takes a number of seconds, 0 or more, not ")
        assert (await database.health(within=30)).answers


def test_a_function_that_is_needed_cannot_be_none() -> None:
    """There is always a rule for COMMIT, so None is refused."""
    assert "a plain function" in refused(nothing, "sqlite://", commit_when=None)


def test_an_option_with_a_typing_error_is_refused() -> None:
    """The error names all options; the value is not shown."""
    said = refused(nothing, "sqlite://", attemps=SECRET)
    options = "commit_when, on_commit_error, attempts, retry_on, retry_after, two_phase, read_only"
    cure = f"It takes {options}, on_report."
    assert said == f"DBSessionMiddleware takes no option attemps. {cure}"


@pytest.mark.parametrize("name", ["database", "databases", "db", "engine", "url"])
def test_a_database_that_is_given_by_name_is_told(name: str) -> None:
    """The value, which may be a URL with a password, is not shown."""
    said = refused(nothing, **{name: f"postgresql://app:{SECRET}@db/shop"})
    cure = "Give databases without a name: `add_middleware(DBSessionMiddleware, database)`."
    assert said == f"DBSessionMiddleware takes no option {name}. {cure}"


@pytest.mark.parametrize("wrong", [True, False, SECRET], ids=["True", "False", "text"])
def test_a_flag_for_read_only_is_told_the_function(wrong: Any) -> None:
    """`begin(read_only=True)` takes a flag, but the middleware takes a function."""
    said = refused(nothing, "sqlite://", read_only=wrong)
    assert said.startswith("read_only takes a plain function, not something of type ")
    assert said.endswith(" Write `read_only=safe_methods`, or leave it out.")


@pytest.mark.parametrize("app", [None, f"sqlite:///{SECRET}", AsyncDatabase("sqlite://")], ids=str)
def test_what_is_no_application_is_refused(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probably the database was given as the application, and the environment names another one."""
    monkeypatch.setenv("DATABASE_URL", "sqlite://")
    assert "Give it the application first" in refused(app)


@pytest.mark.parametrize("options", [{}, {"app": None}, {"attempts": 2}], ids=str)
def test_no_application_at_all_is_refused(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error does not use Python's words for a missing argument."""
    monkeypatch.setenv("DATABASE_URL", "sqlite://")
    assert "Give it the application first" in refused(**options)


@pytest.mark.parametrize("given", [(), ("sqlite:///a.db",), ("sqlite:///a.db", "sqlite:///b.db")])
def test_an_application_may_be_given_by_name(
    given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Litestar's `DefineMiddleware` and Starlette below 0.41.3 pass the application by name."""
    monkeypatch.setenv("DATABASE_URL", "sqlite:///environment.db")
    make: Any = DBSessionMiddleware
    middleware = make(*given, app=nothing, attempts=2)
    assert middleware.app is nothing
    names = [each.url.database for each in middleware.databases]
    assert names == ([each.removeprefix("sqlite:///") for each in given] or ["environment.db"])


@pytest.mark.parametrize(
    ("given", "options", "cure"),
    [
        ((), {"attempts": 0}, "a whole number"),
        ((), {"attemps": 2}, "It takes commit_when, "),
        ((), {"commit_when": nothing}, "`def`, not `async def`"),
        ((), {"two_phase": True}, "Leave out `two_phase=True`"),
        ((), {"two_phase": "no"}, "two_phase takes True or False"),
        ((), {"on_commit_error": lambda: None}, "Write `def on_commit_error(error)`"),
        ((SyncDatabase,), {}, "takes a URL, an AsyncDatabase or a SyncDatabase"),
    ],
)
async def test_a_wrong_argument_fails_the_startup_and_each_request(
    given: tuple[Any, ...], options: dict[str, Any], cure: str
) -> None:
    """Starlette makes its middleware during the lifespan, where servers hide an exception."""
    app = Starlette()
    add: Any = app.add_middleware
    add(DBSessionMiddleware, "sqlite://", *given, **options)
    life = await Life(app).startup()
    await wait([life.task])
    (message,) = life.messages
    assert message["type"] == "lifespan.startup.failed"
    assert cure in message["message"]
    for _ in range(2):
        exchange = await get(app)
        assert (exchange.status, type(exchange.error)) == (500, ConfigurationError)


@BOTH
@pytest.mark.parametrize("options", ["expire_on_commit", ["expire_on_commit"], 1, [], ""], ids=repr)
async def test_session_options_that_are_no_dictionary_are_refused(
    database_class: type[AnyDatabase], options: Any
) -> None:
    """The error is raised when the database is described."""
    said = await told(lambda: database_class("sqlite://", session_options=options))
    assert "session_options takes a dictionary" in said


@pytest.mark.parametrize("wrong", [1, "Session", dict], ids=repr)
async def test_what_is_no_class_of_the_session_behind_is_refused(wrong: Any) -> None:
    """`sync_session_class` must be a subclass of SQLAlchemy's Session."""
    options: Any = {"sync_session_class": wrong}
    said = await told(lambda: AsyncDatabase("sqlite://", session_options=options))
    assert 'session_options["sync_session_class"] takes a subclass of Session' in said


@BOTH
@pytest.mark.parametrize("name", ["", "/shop.db"])
@pytest.mark.parametrize(
    "options",
    [
        {"pool_sise": 3},
        {"pool_size": "20", "max_overflow": 5, "poolclass": QueuePool},
        {"pool_size": 3, "poolclass": StaticPool},
        {"poolclass": "StaticPool"},
        {"connect_args": "timeout=3"},
        {"echo": "yes"},
        {"execution_options": "AUTOCOMMIT"},
        {"plugins": ["nosuch"]},
    ],
    ids=str,
)
async def test_engine_options_that_cannot_work_are_told_at_startup(
    database_class: type[AnyDatabase], name: str, options: dict[str, Any]
) -> None:
    """Any exception of SQLAlchemy becomes a ConfigurationError, which names all options."""
    database = database_class(f"sqlite://{name}", **options)
    said = await told(database.startup)
    assert f"cannot be built with these engine options ({', '.join(options)}" in said
    assert not database.is_running


@BOTH
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"isolation_level": "SNAPSHOT"}, "Valid isolation levels for 'sqlite' are"),
        ({"connect_args": {"nonsense": SECRET}}, "'nonsense'"),
    ],
)
async def test_options_that_the_driver_refuses_are_told_at_startup(
    database_class: type[AnyDatabase], options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """The error shows the driver's own words, and nothing stays running."""
    database = database_class(f"sqlite:///{tmp_path / 'shop.db'}", **options)
    assert reason in await told(database.startup)
    assert not database.is_running


@BOTH
@pytest.mark.parametrize("name", ["no/such/folder/shop.db", "."])
async def test_an_sqlite_file_that_cannot_be_is_told_at_startup(
    database_class: type[AnyDatabase], name: str, tmp_path: Path
) -> None:
    """The error shows the path, so that the reader sees where the file was searched."""
    path = tmp_path / name
    said = await told(database_class(f"sqlite:///{path}").startup)
    assert f"{path}') cannot be reached: unable to open database file" in said


@BOTH
async def test_an_sqlite_url_with_a_slash_too_few_is_told_at_startup(
    database_class: type[AnyDatabase],
) -> None:
    """SQLAlchemy reads the name of the file as a host, and the error says so."""
    database = database_class(f"sqlite://app:{SECRET}@shop.db")
    assert "sqlite:///relative/path/to/file.db" in await told(database.startup)


SERVERS = pytest.mark.parametrize(
    ("database_class", "dialect"),
    [
        (AsyncDatabase, "postgresql+asyncpg"),
        (AsyncDatabase, "postgresql+psycopg"),
        (AsyncDatabase, "mysql+asyncmy"),
        (AsyncDatabase, "mysql+aiomysql"),
        (SyncDatabase, "postgresql+psycopg"),
        (SyncDatabase, "mysql+pymysql"),
    ],
)


@SERVERS
async def test_a_server_that_is_not_there_is_told_at_startup(
    database_class: type[AnyDatabase], dialect: str
) -> None:
    """Nobody listens on port 1."""
    said = await told(database_class(f"{dialect}://app:{SECRET}@127.0.0.1:1/shop").startup)
    assert f"{dialect}://app:***@127.0.0.1:1/shop') cannot be reached: " in said
    assert said.endswith("Is it running, and are host, port, name, user and password right?")


@SERVERS
async def test_a_connect_argument_that_the_driver_does_not_have_is_told_at_startup(
    database_class: type[AnyDatabase], dialect: str
) -> None:
    """The mistake is in the options, not in the server."""
    url = f"{dialect}://app:{SECRET}@127.0.0.1:1/shop"
    database = database_class(url, connect_args={"nonsense": SECRET})
    with pytest.raises(ConfigurationError):
        await database.startup()
    assert "nonsense" in await told(database.startup)
    assert "Check the options in its URL (after `?`) and in `connect_args`" in await told(
        database.startup
    )


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("asyncpg", {"ssl": "nonsense"}),
        ("asyncpg", {"server_settings": 5}),
        ("asyncmy", {"charset": "nonsense"}),
    ],
)
async def test_a_value_that_the_driver_does_not_take_is_told_at_startup(
    kind: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    """These drivers report a wrong value as if the server could not be reached."""
    database = real_database(kind, tmp_path).describe(connect_args=arguments)
    with pytest.raises(ConfigurationError, match="Check the options in its URL"):
        await database.startup()


@pytest.mark.parametrize(
    "word", ["e", "call", "127", "Connect", "host=", "a b", "p@ss", "connection"]
)
@SERVERS
async def test_hiding_a_password_does_not_tell_it(
    database_class: type[AnyDatabase], dialect: str, word: str
) -> None:
    """The whole text is left out, because the rest would reveal the secret."""
    backend, _, driver = dialect.partition("+")
    url = URL.create(f"{backend}+{driver}", "app", word, "127.0.0.1", 1, "shop")
    with pytest.raises(DatabaseUnavailable) as caught:
        await database_class(url).startup()
    reason = str(caught.value).partition("cannot be reached: ")[2]
    assert "***" not in reason
    if len(word) > 3:
        assert "may hold a secret" in reason or word not in reason.partition(". Is it")[0]


@BOTH
def test_a_half_made_database_can_be_printed(database_class: type[AnyDatabase]) -> None:
    """A traceback of the constructor may show local variables."""
    assert repr(database_class.__new__(database_class)) == f"{database_class.__name__}(…)"


@BOTH
@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://app%3A{SECRET}@db/shop",
        f"postgresql://app%3A{SECRET}:pw@db/shop",
        f"postgresql://:{SECRET}@db/shop",
        f"mysql://app@db/shop?password={SECRET}",
    ],
)
def test_no_repr_shows_a_password(database_class: type[AnyDatabase], url: str) -> None:
    """The password is hidden in each part of the URL."""
    assert SECRET not in repr(database_class(url, connect_args={"password": SECRET}))


@BOTH
@pytest.mark.parametrize("variable", [SECRET, "s3cr3t", "DATABASE_URL "])
def test_what_is_no_name_of_a_variable_is_not_quoted(
    database_class: type[AnyDatabase], variable: str
) -> None:
    """The name of an option may be the password itself."""
    with pytest.raises(ConfigurationError) as caught:
        database_class.from_env(variable)
    assert str(caught.value).startswith("The variable is not set. Set it to a database URL")
    assert variable.strip() not in str(caught.value).replace("DATABASE_URL=sqlite", "")


PIECES = st.sampled_from(
    [*":/@?#+&=%[]\"' \n\0", "://", "sqlite", "postgresql", "asyncpg", "db", "1", "ü"]
)


def describe(url: str | URL) -> None:
    """Each value is accepted, or the error explains it, for both kinds of databases."""
    for database_class in (AsyncDatabase, SyncDatabase):
        try:
            shown = repr(database_class(url))
        except DBSessionError as error:
            assert_tells_well(error)
        else:
            assert SECRET not in shown
            assert shown.isprintable()


@given(url=st.text() | st.lists(PIECES).map("".join))
def test_no_text_at_all_is_a_url_that_raises_anything_else(url: str) -> None:
    """Each value is accepted, or `ConfigurationError` says in one line what to write."""
    describe(url)


@given(before=st.lists(PIECES).map("".join), after=st.lists(PIECES).map("".join))
@example(before="b@/", after="")
@example(before="@", after="?")
def test_no_password_is_shown_however_it_was_written(before: str, after: str) -> None:
    """Without percent-encoding, the password may be read as host, port or name, which are shown."""
    describe(f"postgresql://app:{before}{SECRET}{after}@db:5432/shop")
    with suppress(ConfigurationError):
        describe(URL.create("postgresql", "app", f"{before}{SECRET}{after}", "db", 5432, "shop"))
