"""The documentation is built without a warning, and leads nowhere that is not there."""

import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from pages import ROOT, Page

import asgi_dbsession
import asgi_dbsession.testing

SITE = ROOT / "site"
built = pytest.mark.skipif(not find_spec("zensical"), reason="what makes the site is not installed")


class Html(HTMLParser):
    """What a page links to, what it loads, and where one can link to in it."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.places: set[str] = set()
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.places.update(values[name] for name in ("id", "name") if name in values)
        if tag == "a":
            self.links += [values["href"]] if "href" in values else []
        elif "canonical" not in values.get("rel", ""):
            self.loads += [values[name] for name in ("src", "href") if name in values]


@cache
def site() -> dict[Path, Html]:
    """All pages of the site, built from scratch, with warnings as errors."""
    finished = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--clean"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return {file: Html(file) for file in SITE.rglob("*.html")}


@built
def test_every_page_is_built() -> None:
    """And to be found in the navigation of the first one."""
    first = site()[SITE / "index.html"]
    for page in (ROOT / "docs").rglob("*.md"):
        built_page = SITE / page.relative_to(ROOT / "docs").with_suffix(".html")
        assert built_page in site()
        address = str(built_page.relative_to(SITE))
        assert address in [link.removeprefix("./") for link in first.links]


@built
def test_every_link_leads_somewhere() -> None:
    """To a file that is there, and to a place in it; images and raw HTML included."""
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
    """Neither fonts nor scripts nor images: what a reader reads is between them and the site."""
    foreign = re.compile(r"^(https?:)?//")
    loaded = {load for page in site().values() for load in page.loads if foreign.match(load)}
    for style in SITE.rglob("*.css"):
        loaded |= set(
            re.findall(r"(?:url\(|@import )[\"']?((?:https?:)?//[^)\"']+)", style.read_text())
        )
    assert loaded == set()


def test_the_reference_has_every_public_name() -> None:
    """And no other."""
    public = {f"asgi_dbsession.{name}" for name in asgi_dbsession.__all__}
    public |= {f"asgi_dbsession.testing.{name}" for name in asgi_dbsession.testing.__all__}
    shown = re.findall(r"^::: (\S+)$", Page("docs/reference.md").text, re.MULTILINE)
    assert set(shown) == public


def test_every_link_of_the_readme_leads_somewhere() -> None:
    """It is read where there is no site."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", Page("README.md").text)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
