"""Finds the lines of code that use database connections badly, for example keep them idle."""

from collections import defaultdict
from typing import TypedDict

from .now import Connection, DatabaseNow
from .recent import Recent

# `LivePage`, the web page that shows connections, reports a line of code in two cases. Its
# statement has been running for this long (in seconds). Or its statement has ended, and the session
# has since held its connection for this long without using it.
_LONG = 0.5
_MOST_OF_A_KIND = 2


class Finding(TypedDict):
    """A line of code that uses connections badly, for example keeps a connection idle."""

    kind: str
    line: str
    what: str
    route: str


def find(databases: list[DatabaseNow], recent: Recent) -> list[Finding]:
    """Return lines of code that keep a connection idle, run long, or repeat a statement."""
    found = [*_now(databases, "idle"), *_now(databases, "working")]
    lines = {each["line"] for each in found}
    # Also report lines after which an ended request held its connection without using it, for half
    # of `_LONG` or more. While the request runs, nobody is likely to see such a short time.
    idle = [
        each
        for each in recent["idle"]
        if each["after"] not in lines and ":" in each["after"] and each["longest"] >= _LONG / 2
    ]
    for each in idle[:_MOST_OF_A_KIND]:
        what = (
            f"kept a connection idle, for {each['longest']:.2f} s at most and "
            f"{each['total']:.1f} s in {_count(each['units'], 'request')}, until {each['before']}"
        )
        found.append(_finding("idle", each["after"], what, each["route"]))
    for repeated in recent["repeated"][:_MOST_OF_A_KIND]:
        what = f"sent the same statement at least {repeated['times']} times in one request (N+1)"
        found.append(_finding("repeated", repeated["line"], what, repeated["route"]))
    return found


def _now(databases: list[DatabaseNow], state: str) -> list[Finding]:
    found = []
    for database in databases:
        by_line: defaultdict[str, list[Connection]] = defaultdict(list)
        for each in database["connections"]:
            if each["state"] == state and each["since"] >= _LONG and each["line"]:
                by_line[each["line"]].append(each)
        worst = sorted(by_line.items(), key=lambda each: -len(each[1]))
        for line, held in worst[:_MOST_OF_A_KIND]:
            kind = "idle now" if state == "idle" else "slow now"
            what = _what(held, state, len(database["waiting"]))
            found.append(_finding(kind, line, what, held[0]["request"]))
    return found


def _what(held: list[Connection], state: str, waiting: int) -> str:
    longest = max(each["since"] for each in held)
    if state == "idle":
        what = f"keeps {_count(len(held), 'connection')} idle now, for up to {longest:.1f} s"
    else:
        what = f"waits for {_count(len(held), 'statement')} now, for up to {longest:.1f} s"
    return f"{what}, while {_count(waiting, 'request')} wait" if waiting else what


def _finding(kind: str, line: str, what: str, route: str) -> Finding:
    return {"kind": kind, "line": line, "what": what, "route": route}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
