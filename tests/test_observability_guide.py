"""Tests that the guides to observability and health checks work as they are pasted."""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asgi import Life, get
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pages import Page

pytestmark = pytest.mark.anyio

GUIDE = Page("docs/how-to/observability.md")
HEALTH = Page("docs/how-to/health-checks.md")
LOG, BROWSER, IDLE, SEVERAL, SPANS, STATEMENTS = range(6)


@pytest.fixture(autouse=True)
def database_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'shop.db'}")


async def ask(page: Page, number: int, path: str) -> Any:
    """Run the application of this block with one request, from startup to shutdown."""
    app = page.run(number)["app"]
    life = await Life(app).startup()
    exchange = await get(app, path)
    await life.shutdown()
    assert exchange.error is None
    return exchange


async def test_a_line_is_logged_for_each_unit(caplog: pytest.LogCaptureFixture) -> None:
    """The log lines have the numbers that the guide explains."""
    with caplog.at_level(logging.INFO, "shop.database"):
        await ask(GUIDE, LOG, "/orders")
    (line,) = [each.getMessage() for each in caplog.records if each.name == "shop.database"]
    assert re.fullmatch(
        r"/orders committed \(None\): 1 statements in [\d.]+ ms, waited [\d.]+ ms, held [\d.]+ ms",
        line,
    )


async def test_the_header_looks_as_shown() -> None:
    """The log lines are equal except for the numbers."""
    exchange = await ask(GUIDE, BROWSER, "/orders")
    sent = dict(exchange.messages[0]["headers"])[b"server-timing"].decode()
    (shown,) = GUIDE.blocks("http")
    assert re.sub(r"\d+\.\d", "0", f"server-timing: {sent}\n") == re.sub(r"\d+\.\d", "0", shown)


async def test_the_warning_looks_as_shown(caplog: pytest.LogCaptureFixture) -> None:
    """The warning is equal except for the file; its lines are those of the two statements."""
    with caplog.at_level(logging.WARNING, "asgi_dbsession"):
        await ask(GUIDE, IDLE, "/pay")
    (message,) = caplog.messages
    (shown,) = GUIDE.blocks("text")
    told = re.sub(r"'.*'|0\.\d+ s|\S+(?=:\d)", "", message)
    assert told == re.sub(r"'.*'|0\.\d+ s|\S+(?=:\d)", "", " ".join(shown.split()))


def test_several_functions_make_one() -> None:
    """The function takes a report, as `on_report` does."""
    assert callable(GUIDE.run(SEVERAL)["on_report"])


@pytest.fixture
def spans() -> Iterator[Any]:
    """Return the spans that OpenTelemetry would export."""
    exporter = InMemorySpanExporter()
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        provider = TracerProvider()
        trace.set_tracer_provider(provider)
    processor = SimpleSpanProcessor(exporter)
    provider.add_span_processor(processor)
    yield exporter
    processor.shutdown()


async def test_a_unit_of_work_is_a_span_below_the_request(spans: Any) -> None:
    """The span has the outcome and the statements of the unit."""
    with trace.get_tracer("test").start_as_current_span("request"):
        await ask(GUIDE, SPANS, "/orders")
    unit, request = spans.get_finished_spans()
    assert (unit.name, request.name) == ("unit of work", "request")
    assert unit.parent.span_id == request.context.span_id
    assert request.start_time - 1e6 <= unit.start_time <= unit.end_time <= request.end_time + 1e6
    assert unit.attributes["asgi_dbsession.outcome"] == "committed"
    (event,) = unit.events
    assert event.attributes["db.system.name"] == "sqlite"
    assert event.attributes["asgi_dbsession.statements"] == 1


async def test_each_statement_is_a_span_too(spans: Any) -> None:
    """It works with the installed SQLAlchemy, although the instrumentation names other versions."""
    await ask(GUIDE, STATEMENTS, "/orders")
    texts = [each.attributes.get("db.statement") for each in spans.get_finished_spans()]
    assert "SELECT 7" in texts


async def test_the_health_route_answers() -> None:
    """The answer is 200 with the state of the pool; the other route needs no database."""
    exchange = await ask(HEALTH, 0, "/health")
    assert exchange.status == 200
    found = json.loads(exchange.body)
    assert found["database"] is True
    assert found["pool"] == {"size": 5, "used": 0, "overflow": 0}
    assert (await ask(HEALTH, 0, "/alive")).status == 200


async def test_the_health_route_says_503_without_a_database() -> None:
    """The test asks before the startup."""
    exchange = await get(HEALTH.run(0)["app"], "/health")
    assert (exchange.status, json.loads(exchange.body)["database"]) == (503, False)
