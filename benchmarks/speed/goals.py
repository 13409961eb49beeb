"""Compares the goals with the results."""

from typing import Any, NamedTuple

from .tools import BY_HAND, OURS, TRANSACTION, title


class Goal(NamedTuple):
    """One goal with its result.

    Attributes:
        hoped: The goal, as text.
        measured: The result, as text.
        is_met: True if the result meets the goal.
    """

    hoped: str
    measured: str
    is_met: bool


def goals(found: dict[str, Any]) -> list[Goal]:
    """Return all goals, computed from the figures."""
    in_process = found["in process"]
    idle = in_process["Starlette alone"]["no database use"]
    more = idle[OURS]["taken"][1] - idle[BY_HAND]["taken"][1]
    first, last = found["long run"][0], found["long run"][-1]
    growth = last["memory"] - first["memory"]
    kinds = ("tasks", "descriptors", "connections")
    requests = f"{last['requests']:,}".replace(",", " ")
    return [
        Goal("Starlette alone, no database use: at most 2 µs more", f"{more:+.1f} µs", more <= 2),
        *(
            _ratio(in_process, family, scenario, most)
            for family, scenario, most in (
                ("FastAPI", "one SELECT", 0.66),
                ("FastAPI with psycopg", "one SELECT", 0.85),
                ("FastAPI", "ten SELECTs", 0.95),
                ("FastAPI", "one INSERT", 0.97),
                ("FastAPI, handlers with `def`", "one SELECT", 1.0),
                ("FastAPI, handlers with `def`", "one INSERT", 1.25),
            )
        ),
        *(
            _rate(clients, figures)
            for clients, figures in found["fast readers"].items()
            if clients in ("1", "100")
        ),
        Goal(
            f"over {requests} requests: flat",
            f"{growth:+.1f} MB, "
            + ", ".join(f"{last[kind] - first[kind]:+d} {kind}" for kind in kinds),
            growth < 1 and all(last[kind] == first[kind] for kind in kinds),
        ),
    ]


def _ratio(in_process: dict[str, Any], family: str, scenario: str, most: float) -> Goal:
    ratio = in_process[family][scenario][OURS]["ratio"][1]
    hoped = f"{family}, {scenario}: at most {most:.2f} times hand-written code"
    return Goal(hoped, f"{ratio:.2f} times", ratio <= most)


def _rate(clients: str, figures: dict[str, Any]) -> Goal:
    """Compare the responses per second with those of the fastest other tool."""
    others = {
        tool: each["taken"][1] for tool, each in figures.items() if tool not in (OURS, TRANSACTION)
    }
    fastest = max(others, key=lambda tool: others[tool])
    ratio = figures[OURS]["taken"][1] / max(others[fastest], 0.001)
    crowd = "1 client" if clients == "1" else f"{clients} clients"
    return Goal(
        f"one SELECT over uvicorn, {crowd}: 1.20 times the responses of the fastest other tool",
        f"{ratio:.2f} times {title(fastest)}",
        ratio >= 1.2,
    )
