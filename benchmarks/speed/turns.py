"""Measures several tools alternately, so that other load on the machine affects all of them."""

import gc
import math
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from random import Random
from typing import TypeAlias

from .tools import base

Ask: TypeAlias = Callable[[], Awaitable[None]]
Rounds: TypeAlias = dict[str, list[float]]
# The lower quartile, the median and the upper quartile.
Spread: TypeAlias = tuple[float, float, float]

SCENARIOS = {
    "no database use": ("GET", "/nothing"),
    "one SELECT": ("GET", "/read"),
    "one INSERT": ("POST", "/insert"),
    "ten SELECTs": ("GET", "/ten"),
    "an export of 1 000 rows": ("GET", "/export"),
}


async def in_turn(asks: Mapping[str, Ask], rounds: int, seconds: float) -> Rounds:
    """Return the microseconds per request of each tool, one value for each round.

    Args:
        asks: For each tool, a function that sends one request.
        rounds: How often each tool is measured. Each round has another order, because a tool finds
            in the processor's caches what the tool before it has left there.
        seconds: Seconds for one tool in one round, approximately.
    """
    requests = 1
    for ask in asks.values():
        took = min([await _time(ask, 5) for _ in range(min(5, rounds))])
        requests = max(requests, round(seconds * 1e6 / took))
    gc.collect()
    gc.freeze()
    taken: Rounds = {tool: [] for tool in asks}
    order = list(asks)
    orders = Random(rounds)
    for _ in range(rounds):
        orders.shuffle(order)
        for tool in order:
            taken[tool].append(await _time(asks[tool], requests))
    return taken


def spread(values: Sequence[float]) -> Spread:
    """Return the median and the two quartiles."""
    if len(values) < 2:  # no figures, because no request was served
        value = values[0] if values else math.nan
        return value, value, value
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def compare(rounds: Rounds) -> dict[str, dict[str, Spread]]:
    """Return the time of each tool, its ratio to `by_hand`, and this package's ratio to it.

    Each ratio is computed within one round, so a round that is slow for all tools changes nothing.
    """
    by_base = {base(tool): values for tool, values in rounds.items()}
    return {
        tool: {
            "taken": spread(values),
            "ratio": _ratio(values, by_base["by_hand"]),
            "ours to it": _ratio(by_base["asgi_dbsession"], values),
        }
        for tool, values in by_base.items()
    }


def _ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    return spread([one / other for one, other in zip(over, under, strict=True) if other])


async def _time(ask: Ask, requests: int) -> float:
    start = time.perf_counter()
    for _ in range(requests):
        await ask()
    return (time.perf_counter() - start) / requests * 1e6
