"""pydantic-settings: URL and pool options from one place, and no password in what is printed."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asgi import get
from pages import Page
from pydantic import PostgresDsn, ValidationError

from asgi_dbsession import AsyncDatabase, ConfigurationError

pytestmark = pytest.mark.anyio

PAGE = Page("docs/how-to/settings.md")
URL = "postgresql://app:hush@db/shop"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the files of the page can be imported from."""
    for name in ("settings.py", "shop.py"):
        (tmp_path / name).write_text(PAGE.files()[name])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    for name in ("settings", "shop"):
        sys.modules.pop(name, None)


def load(name: str) -> Any:
    """Import a file of the page."""
    return importlib.import_module(name)


async def test_url_and_pool_options_come_from_the_environment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment overrides the file."""
    (folder / ".env").write_text(PAGE.blocks("ini")[0])
    monkeypatch.setenv("SHOP_MAX_OVERFLOW", "3")
    module = load("shop")
    assert (module.database.url.host, module.database.url.password) == ("db", "secret")
    pool: Any = module.database._build_engine().pool
    assert (pool.size(), pool._max_overflow, pool.timeout()) == (10, 3, 0.5)
    assert "secret" not in f"{module.settings!r} {module.settings} {module.database!r}"


async def test_the_application_answers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the settings that the tests of the page use."""
    namespace: dict[str, Any] = {}
    monkeypatch.setenv("SHOP_DATABASE_URL", "")  # restored at the end
    exec(PAGE.files()["conftest.py"], namespace)
    module = load("shop")
    async with module.database:
        assert (await get(module.app)).body == b"42"


@pytest.mark.parametrize("name", ["SHOP_POOL_SIZE", "SHOP_DATABASE_URL"])
def test_an_error_names_the_setting_and_no_value(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A setting is wrong or missing. Without `hide_input_in_errors`, other settings are printed."""
    monkeypatch.setenv("SHOP_POOL_SIZE", "hush")
    if name == "SHOP_POOL_SIZE":
        monkeypatch.setenv("SHOP_DATABASE_URL", URL)
    settings = load("settings").Settings
    with pytest.raises(ValidationError) as caught:
        settings()
    assert name.removeprefix("SHOP_").lower() in str(caught.value)
    assert "hush" not in str(caught.value)
    settings.model_config["hide_input_in_errors"] = False
    settings.model_rebuild(force=True)
    with pytest.raises(ValidationError, match="hush"):
        settings()


def test_a_secret_can_come_from_a_file(folder: Path) -> None:
    """The value ends with a line break, as in a file."""
    (folder / "shop_database_url").write_text(f"{URL}\n")
    assert 'Settings(_secrets_dir="/run/secrets")' in PAGE.text
    settings = load("settings").Settings(_secrets_dir=folder)
    database = AsyncDatabase(settings.database_url.get_secret_value())
    assert (database.url.password, database.url.database) == ("hush", "shop")


def test_what_the_page_warns_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `PostgresDsn` shows its password, and a `SecretStr` is not a URL."""
    monkeypatch.setenv("SHOP_DATABASE_URL", URL)
    settings = load("settings").Settings()
    with pytest.raises(ConfigurationError, match="is not a database URL"):
        AsyncDatabase(settings.database_url)
    assert "hush" in str(PostgresDsn(URL))
