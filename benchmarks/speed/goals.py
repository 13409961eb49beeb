"""What was hoped for, and what came out."""

from typing import Any, NamedTuple

from .tools import AUTOCOMMIT, BY_HAND, DEPENDS, OURS, title

STATEMENTS = ("one SELECT", "one INSERT")


class Goal(NamedTuple):
    """One of them.

    Attributes:
        hoped: What was hoped for.
        measured: What came out.
        is_met: Whether that is it.
    """

    hoped: str
    measured: str
    is_met: bool


def goals(found: dict[str, Any]) -> list[Goal]:
    """All of them, from the figures."""
    in_process = found["in process"]
    starlette = in_process["Starlette alone"]
    idle = starlette["no database use"]
    more = idle[OURS]["taken"][1] - idle[BY_HAND]["taken"][1]
    ratio = idle[OURS]["to by hand"][1]
    autocommit = starlette["one SELECT"][AUTOCOMMIT]["to by hand"][1]
    fastapi, blocking = in_process["FastAPI"], in_process["FastAPI, handlers with `def`"]
    hand = {each: fastapi[each][OURS]["to by hand"][1] for each in STATEMENTS}
    sync = {each: blocking[each][DEPENDS]["ours to it"][1] for each in STATEMENTS}
    slower = [
        f"{title(tool)} {figures['ours to it'][1]:.2f} times, {each}"
        for each in STATEMENTS
        for tool, figures in fastapi[each].items()
        if tool not in (OURS, BY_HAND) and figures["ours to it"][1] >= 1
    ]
    times = {
        f"with {clients} client{'s' * (clients != '1')}": each[OURS]["taken"][1]
        / max(each[DEPENDS]["taken"][1], 0.001)
        for clients, each in found["slow readers"].items()
    }
    first, last = found["long run"][0], found["long run"][-1]
    kinds = ("tasks", "descriptors", "connections")
    growth = last["memory"] - first["memory"]
    return [
        Goal(
            "no database use: at most 2 µs more than the application alone, and 1.15 times",
            f"{more:+.1f} µs, {ratio:.2f} times",
            more <= 2 and ratio <= 1.15,
        ),
        Goal(
            "one statement: at most 0.95 times hand-written code",
            _listed(hand),
            max(hand.values()) <= 0.95,
        ),
        Goal(
            "one statement: faster than every other tool",
            "of every one" if not slower else f"not of {'; '.join(slower)}",
            not slower,
        ),
        Goal(
            "one SELECT in autocommit: at most 0.75 times hand-written code",
            f"{autocommit:.2f} times",
            autocommit <= 0.75,
        ),
        Goal(
            "handlers with `def`: at most 1.0 times FastAPI's own `Depends`",
            _listed(sync),
            max(sync.values()) <= 1,
        ),
        Goal(
            "slow readers, a pool of five: at least 10 times the downloads of the request-scoped "
            "`Depends`, for one number of clients or another",
            ", ".join(f"{each:.1f} times {name}" for name, each in times.items()),
            max(times.values()) >= 10,
        ),
        Goal(
            f"over {last['requests']:,} requests: flat".replace(",", " "),
            f"{growth:+.1f} MB, and "
            + ", ".join(f"{last[kind] - first[kind]:+d} {kind}" for kind in kinds),
            growth < 1 and all(last[kind] == first[kind] for kind in kinds),
        ),
    ]


def _listed(ratios: dict[str, float]) -> str:
    return ", ".join(f"{name} {ratio:.2f} times" for name, ratio in ratios.items())
