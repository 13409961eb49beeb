"""Writes the first three sentences of the document from the figures."""

from typing import Any

from .tools import BY_HAND, DEPENDS, OURS, title

_STATEMENTS = ("one SELECT", "one INSERT")


def costs(found: dict[str, Any]) -> str:
    """Return a sentence about the time that the package adds to a request."""
    idle = found["in process"]["FastAPI"]["no database use"]
    more = idle[OURS]["taken"][1] - idle[BY_HAND]["taken"][1]
    (select, insert), (served_select, served_insert) = (
        [found[where]["FastAPI"][each][OURS]["ratio"][1] for each in _STATEMENTS]
        for where in ("in process", "over uvicorn")
    )
    return (
        f"a request without database use takes {more:.1f} µs longer than without the package. Over "
        f"uvicorn, a request with one SELECT takes {served_select:.2f} times, and with one INSERT "
        f"{served_insert:.2f} times, the time of hand-written code. In process, without the "
        f"server, it takes {select:.2f} and {insert:.2f} times."
    )


def wins(found: dict[str, Any]) -> str:
    """Return a sentence about listeners of events on a small pool."""
    ours, other = (found["listeners"][each] for each in (OURS, DEPENDS))
    return (
        "a client that reads slowly holds no connection. On a pool of five connections, "
        f"{ours['heard']} clients received server-sent events at the same time; with a FastAPI "
        f"dependency that stays open until the response has ended, {other['heard']} clients did."
    )


def loses(found: dict[str, Any]) -> str:
    """Return a sentence about a faster tool, if there is one, and about the slowest handlers."""
    clients, figures = max(found["fast readers"].items(), key=_lag)
    fastest = _fastest(figures)
    theirs, ours = (round(figures[each]["taken"][1]) for each in (fastest, OURS))
    crowd = "1 client" if clients == "1" else f"{clients} clients"
    slower = (
        f"with {crowd} over uvicorn, *{title(fastest)}* serves {theirs} responses per second, and "
        f"this package {ours}; "
    )
    of_def = found["in process"]["FastAPI, handlers with `def`"]
    ratios = {each: of_def[each][OURS]["ratio"][1] for each in ("one SELECT", "one INSERT")}
    worst = max(ratios, key=lambda each: ratios[each])
    return (
        f"{slower if ours < theirs else ''}a `def` handler with {worst} takes "
        f"{ratios[worst]:.2f} times the time of hand-written code."
    )


def _lag(crowd: tuple[str, Any]) -> float:
    _, figures = crowd
    return float(figures[_fastest(figures)]["taken"][1] / max(figures[OURS]["taken"][1], 0.001))


def _fastest(figures: dict[str, Any]) -> str:
    others = [each for each in figures if each != OURS]
    return max(others, key=lambda each: float(figures[each]["taken"][1]))
