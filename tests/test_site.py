"""Tests that the documentation is built without warnings, and has no dead links."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from fcntl import LOCK_EX, flock
from functools import cache
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from tempfile import gettempdir
from urllib.parse import unquote, urlsplit

import pytest
from pages import ROOT, Page

import asgi_dbsession
import asgi_dbsession.live
import asgi_dbsession.testing

SITE = ROOT / "site"
built = pytest.mark.skipif(not find_spec("zensical"), reason="what makes the site is not installed")


class Html(HTMLParser):
    """Collects the links, the loaded files and the link targets of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.links_of_text: list[str] = []
        self.loads: list[str] = []
        self.places: set[str] = set()
        self._in_text = False
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.places.update(values[name] for name in ("id", "name") if name in values)
        self._in_text |= tag == "article"
        if tag == "a":
            links = [values["href"]] if "href" in values else []
            self.links += links
            self.links_of_text += links if self._in_text else []
        elif "canonical" not in values.get("rel", ""):
            self.loads += [values[name] for name in ("src", "href") if name in values]

    def handle_endtag(self, tag: str) -> None:
        self._in_text &= tag != "article"


@cache
def site() -> dict[Path, Html]:
    """Build all pages of the site, with warnings as errors; once for all processes of a run."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    built_by = SITE / f".{run}"
    with (Path(gettempdir()) / "asgi-dbsession-site.lock").open("w") as lock:
        flock(lock, LOCK_EX)
        if run is None or not built_by.exists():
            finished = subprocess.run(
                [sys.executable, "-m", "zensical", "build", "--strict", "--clean"],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
            )
            assert finished.returncode == 0, finished.stdout + finished.stderr
            built_by.touch()
    return {file: Html(file) for file in SITE.rglob("*.html")}


@built
def test_a_deployed_site_knows_its_address_and_its_repository(tmp_path: Path) -> None:
    """The workflow gives both; each page has them, and asks the repository's host for nothing."""
    for name in ("docs", "docs_theme", ".ci", "asgi_dbsession"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("zensical.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    addresses = {"SITE_URL": "https://docs.example/db", "REPO_URL": "https://github.com/owner/db"}
    workflow = (ROOT / ".github" / "workflows" / "docs.yml").read_text()
    assert all(name in workflow for name in ("bash .ci/site", *addresses))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(
        ["bash", ".ci/site"],
        cwd=tmp_path,
        env=os.environ | addresses | {"PATH": path},
        capture_output=True,
        check=True,
    )
    page = (tmp_path / "site" / "how-to" / "mcp.html").read_text()
    assert '<link rel="canonical" href="https://docs.example/db/how-to/mcp.html">' in page
    assert 'href="https://github.com/owner/db"' in page
    assert 'data-md-component="source"' not in page  # makes the theme call the API of GitHub
    assert 'href="https://docs.example/db/"' in (tmp_path / "site" / "404.html").read_text()
    assert sorted(tmp_path.glob("zensical*")) == [tmp_path / "zensical.toml"]


@built
def test_a_local_site_names_no_address() -> None:
    """Without the two, no page points to an address that may not exist."""
    for file in site():
        assert not re.search('rel="canonical"|class="md-source"', file.read_text()), file


@built
def test_every_page_is_built() -> None:
    """Each page is in the navigation of the home page."""
    first = site()[SITE / "index.html"]
    for page in (ROOT / "docs").rglob("*.md"):
        built_page = SITE / page.relative_to(ROOT / "docs").with_suffix(".html")
        assert built_page in site()
        address = str(built_page.relative_to(SITE))
        assert address in [link.removeprefix("./") for link in first.links]


@built
def test_two_clicks_lead_from_home_to_every_page() -> None:
    """By links of the text: who does not know what to look for does not open the navigation."""
    found = {SITE / "index.html"}
    for _ in range(2):
        for page in found & site().keys():
            links = [unquote(urlsplit(link).path) for link in site()[page].links_of_text]
            found |= {(page.parent / link).resolve() for link in links if link}
    assert site().keys() - found == {SITE / "404.html"}


@built
def test_every_link_leads_somewhere() -> None:
    """Each link leads to an existing file and an existing heading, also in images and HTML."""
    broken = []
    for file, page in site().items():
        for link in page.links + page.loads:
            url = urlsplit(link)
            if url.scheme or file.name == "404.html":
                continue
            target = (file.parent / unquote(url.path)).resolve() if url.path else file
            places = site()[target].places if target in site() else set()
            is_there = target.exists() and target.is_relative_to(SITE)
            if not is_there or (url.fragment and unquote(url.fragment) not in places):
                broken.append((str(file.relative_to(SITE)), link))
    assert broken == []


@built
def test_nothing_is_loaded_from_another_host() -> None:
    """Fonts, scripts and images come from the site itself, so no other site sees the readers."""
    foreign = re.compile(r"^(https?:)?//")
    loaded = {load for page in site().values() for load in page.loads if foreign.match(load)}
    for style in SITE.rglob("*.css"):
        loaded |= set(
            re.findall(r"(?:url\(|@import )[\"']?((?:https?:)?//[^)\"']+)", style.read_text())
        )
    assert loaded == set()


# Typical searches, and the page that answers each of them.
SEARCHES = {
    "observability": "how-to/observability",
    "opentelemetry": "how-to/observability",
    "troubleshooting": "troubleshooting",
    "multi-tenant": "how-to/multi-tenancy",
    "multi-tenancy": "how-to/multi-tenancy",
    "row-level security": "how-to/multi-tenancy",
    "sqlmodel": "how-to/sqlmodel",
    "strawberry": "how-to/strawberry",
    "graphql": "how-to/strawberry",
    "socket.io": "how-to/socketio",
    "mcp": "how-to/mcp",
    "fastapi users": "how-to/fastapi-users",
    "sqladmin": "how-to/sqladmin",
    "apscheduler": "how-to/apscheduler",
    "jwt": "how-to/litestar-jwt",
    "llm": "how-to/llm-streams",
    "async_scoped_session": "migrate/async-scoped-session",
    "cached plan": "how-to/retry",
    "503": "how-to/overload",
    "queuepool limit": "how-to/overload",
    "repository": "how-to/services",
    "join a transaction": "how-to/services",
    "rq": "how-to/workers",
    "arq": "how-to/workers",
    "notebook": "how-to/workers",
    "fork": "how-to/workers",
    "get_bind": "how-to/routing-sessions",
    "replica": "how-to/replicas",
    "retry": "how-to/retry",
    "deadlock": "how-to/retry",
    "serialization failure": "how-to/retry",
    "pgbouncer": "how-to/drivers",
    "asyncpg": "how-to/drivers",
    "celery": "how-to/background-work",
    "background task": "how-to/background-work",
    "depends": "how-to/dependency-injection",
    "get_db": "migrate/get-db",
    "async_sessionmaker": "migrate/get-db",
    "sessionlocal": "migrate/session-local",
    "scoped_session": "migrate/scoped-session",
    "flask-sqlalchemy": "migrate/flask-sqlalchemy",
    "server-sent events": "how-to/streaming",
    "streamingresponse": "how-to/streaming",
    "websocket": "how-to/websockets",
    "pytest": "how-to/testing",
    "n+1": "how-to/testing",
    "testclient": "how-to/testing",
    "alembic": "tutorial",
    "kubernetes": "how-to/deployment",
    "pool size": "how-to/deployment",
    "missinggreenlet": "troubleshooting",
    "was never awaited": "troubleshooting",
    "expire_on_commit": "faq",
    "savepoint": "glossary",
    "two-phase commit": "how-to/several-databases",
    "read-only": "how-to/read-only-requests",
    "uvicorn": "how-to/servers",
    "heroku": "how-to/hosting-providers",
    "neon": "how-to/hosting-providers",
    "supabase": "how-to/hosting-providers",
    "rds": "how-to/hosting-providers",
    "sslmode": "how-to/hosting-providers",
    "docker": "how-to/containers",
    "gunicorn": "how-to/containers",
    "preload_app": "how-to/containers",
    "readinessprobe": "how-to/containers",
    "sentry": "how-to/sentry",
    "request id": "how-to/sentry",
    "pagination": "how-to/pagination",
    "keyset": "how-to/pagination",
    "cursor": "how-to/pagination",
    "offset": "how-to/pagination",
    "fastapi-pagination": "how-to/pagination",
    "409": "how-to/unique-constraints",
    "unique constraint": "how-to/unique-constraints",
    "integrityerror": "how-to/unique-constraints",
    "export": "how-to/streaming",
    "rollback": "how-to/testing",
    "exhaust": "how-to/overload",
    "tenant": "how-to/multi-tenancy",
    "multiple databases": "how-to/several-databases",
    "two databases": "how-to/several-databases",
    "several databases": "how-to/several-databases",
    "pydantic-settings": "how-to/settings",
    "basesettings": "how-to/settings",
    "secretstr": "how-to/settings",
    "copy": "how-to/postgresql",
    "listen": "how-to/postgresql",
    "notify": "how-to/postgresql",
    "advisory lock": "how-to/postgresql",
    "comparison": "explanation/comparison",
    "cheat sheet": "cheat-sheet",
    "faq": "faq",
    "slow uploads": "how-to/slow-uploads",
    "threat model": "explanation/threat-model",
}


@built
@pytest.mark.parametrize(("words", "page"), SEARCHES.items())
def test_a_search_finds_the_page_that_answers(words: str, page: str) -> None:
    """The page is among the three best results."""
    site()
    scores: Counter[str] = Counter()
    for item in json.loads((SITE / "search.json").read_text())["items"]:
        place = item["location"].partition(".html")[0]
        in_heading = words in item["title"].lower()
        in_text = item["text"].lower().count(words)
        scores[place] += 20 * in_heading * (item["level"] == 1) + 5 * in_heading + min(in_text, 3)
    assert page in [place for place, score in scores.most_common(3) if score]


@built
def test_a_missing_page_leads_home() -> None:
    """From any wrong address, the page links to the home page and to frequent pages."""
    links = site()[SITE / "404.html"].links
    assert "/" in links
    for link in links:
        if link.endswith(".html") and not urlsplit(link).scheme:
            assert (SITE / link.lstrip("/")).exists()


@built
def test_every_page_shows_the_version() -> None:
    """The version at the foot of each page is that of the package."""
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for file in site():
        assert f"asgi_dbsession {metadata['version']}" in file.read_text(), file


@built
def test_every_page_describes_itself() -> None:
    """Search engines and chat programs show the description below the title."""
    described = re.compile(r'<meta name="description" content="([^"]+)"')
    found = Counter(
        described.findall(file.read_text())[0] for file in site() if file.name != "404.html"
    )
    assert [text for text, number in found.items() if number > 1] == []


def test_the_reference_has_every_public_name() -> None:
    """The reference shows the public names, and no other names."""
    public = {f"asgi_dbsession.{name}" for name in asgi_dbsession.__all__}
    public |= {f"asgi_dbsession.live.{name}" for name in asgi_dbsession.live.__all__}
    public |= {f"asgi_dbsession.testing.{name}" for name in asgi_dbsession.testing.__all__}
    shown = re.findall(r"^::: (\S+)$", Page("docs/reference.md").text, re.MULTILINE)
    assert set(shown) == public


def test_every_link_of_the_readme_leads_somewhere() -> None:
    """The README is read in places without the site, so its links lead to files."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", Page("README.md").text)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
