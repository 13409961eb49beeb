"""Makes the HTML tables of the web page that shows database connections."""

from collections import Counter
from html import escape

from .findings import Finding
from .now import Connection, DatabaseNow
from .recent import Recent

_MOST_ROUTES = 20
_TEN_MS = 0.01
_MOST_WAITING = 4
_STATES = {"free": "free", "working": "at work", "idle": "idle", "other": "in use"}


def summary(databases: list[DatabaseNow]) -> str:
    """Return how many connections of each database are in use, and how many requests wait."""
    sentences = []
    for each in databases:
        most = "" if each["most"] is None else f" of at most {each['most']}"
        waiting = len(each["waiting"])
        waits = f"{waiting} waiting" if waiting else "nobody waits"
        sentences.append(f"{each['name']}: {each['in_use']}{most} in use, {waits}.")
    return " ".join(sentences)


def findings(found: list[Finding]) -> str:
    """Return an HTML list of the lines of code that need attention.

    These lines leave a connection idle, wait long for a statement, or send it many times.
    """
    if not found:
        return "<p class=calm>Nothing stands out.</p>"
    items = "".join(
        f'<li class="{_class(each["kind"])}"><code>{_line(each["line"])}</code> '
        f"<span>{escape(each['what'])}. <b>{escape(each['route'])}</b></span></li>"
        for each in found
    )
    return f"<ol>{items}</ol>"


def now(databases: list[DatabaseNow]) -> str:
    """Return the connections of each database, as HTML tables."""
    return "".join(_database(each) for each in databases)


def _database(database: DatabaseNow) -> str:
    name = escape(database["name"])
    if not database["is_running"]:
        return f"<h3>{name}</h3><p class=calm>It is not running.</p>"
    rows = "".join(_lane(each) for each in database["connections"])
    return (
        f"<h3>{name}</h3><div class=waiting>{_waiting(database)}</div>"
        f"<table class=lanes><caption>Connections of {name}</caption><thead><tr>"
        "<th scope=col>#</th><th scope=col>State</th><th scope=col>Request</th>"
        "<th scope=col class=number>Held</th><th scope=col>Line</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def _lane(lane: Connection) -> str:
    state = lane["state"]
    first = f"<th scope=row>{lane['lane']}</th>"
    if state in ("free", "other"):
        what = "outside of a unit of work" if state == "other" else ""
        shown = f"<span class=chip>{_STATES[state]}</span>"
        return f"<tr class={state}>{first}<td>{shown}<td>{what}<td><td></tr>"
    where = "in a transaction" if lane["in_transaction"] else "no transaction"
    where = f"{where}, read-only" if lane["read_only"] else where
    verb = "since" if state == "working" else "after"
    return (
        f"<tr class={state}>{first}"
        f"<td><span class=chip>{_STATES[state]} {lane['since']:.1f} s</span> <small>{where}</small>"
        f"<td>{escape(lane['request'])}<td class=number>{lane['held']:.1f} s"
        f"<td><span dir=ltr>{verb} <code>{_line(lane['line'] or 'its checkout')}</code></span> "
        f"<small>{escape(lane['statement'])}</small></tr>"
    )


def _waiting(database: DatabaseNow) -> str:
    waiting = database["waiting"]
    if not waiting:
        return "<p class=calm>Nobody waits for a connection.</p>"
    routes = Counter(each["request"] for each in waiting)
    shown = [f"{number} × {escape(route)}" for route, number in routes.most_common(_MOST_WAITING)]
    more = sum(routes.values()) - sum(n for _, n in routes.most_common(_MOST_WAITING))
    shown += [f"{more} others"] if more else []
    longest = waiting[0]["seconds"]
    number = f"{len(waiting)} {'waits' if len(waiting) == 1 else 'wait'} for a connection"
    return f"<p class=alarm><b>{number}</b>, for up to {longest:.1f} s: {', '.join(shown)}</p>"


def recent(found: Recent) -> str:
    """Return the summary of the ended units of work, as HTML tables."""
    return f"{_routes(found)}{_repeated(found)}{_idle(found)}"


def _routes(found: Recent) -> str:
    rows = []
    for each in found["routes"][:_MOST_ROUTES]:
        why = ", ".join(f"{number} × {reason}" for reason, number in each["rolled_back"].items())
        rows.append(
            f"<tr><th scope=row>{escape(each['route'])}</th><td class=number>{each['units']}"
            f"<td class=number>{_ms(each['held_p50'])}<td class=number>{_ms(each['held_p95'])}"
            f"<td class=number>{_ms(each['waited_p95'])}"
            f"<td class=number>{each['statements']:.1f}<td class=number>{each['conflicts'] or '–'}"
            f"<td>{escape(why) or '–'}</tr>"
        )
    heads = (
        "<th scope=col>Request<th scope=col class=number>Units"
        "<th scope=col class=number>Held p50<th scope=col class=number>Held p95"
        "<th scope=col class=number>Waited p95<th scope=col class=number>Statements"
        "<th scope=col class=number>Conflicts<th scope=col>Rolled back, and why"
    )
    text = f"The last {found['units']} units of work, by request"
    return _table(text, heads, rows, "No unit of work has ended yet.")


def _repeated(found: Recent) -> str:
    rows = [
        f"<tr><th scope=row><code>{_line(each['line'])}</code></th>"
        f"<td class=number>{each['times']}<td class=number>{each['units']}"
        f"<td>{escape(each['route'])}<td><small>{escape(each['statement'])}</small></tr>"
        for each in found["repeated"]
    ]
    heads = (
        "<th scope=col>Line<th scope=col class=number>Times, at least"
        "<th scope=col class=number>Units"
        "<th scope=col>Request<th scope=col>Statement"
    )
    return _table("The same statement many times in one request (N+1)", heads, rows, "None.")


def _idle(found: Recent) -> str:
    rows = [
        f"<tr><th scope=row><code>{_line(each['after'])}</code></th>"
        f"<td><code>{_line(each['before'])}</code><td class=number>{_ms(each['longest'])}"
        f"<td class=number>{each['total']:.1f} s<td class=number>{each['units']}"
        f"<td>{escape(each['route'])}</tr>"
        for each in found["idle"]
    ]
    heads = (
        "<th scope=col>After this line<th scope=col>Before this line"
        "<th scope=col class=number>Longest<th scope=col class=number>In all"
        "<th scope=col class=number>Units<th scope=col>Request"
    )
    return _table("The longest times that a connection was held idle", heads, rows, "None.")


def _table(caption: str, heads: str, rows: list[str], empty: str) -> str:
    body = "".join(rows) or f"<tr><td colspan=9 class=calm>{empty}</tr>"
    return (
        f"<h3>{escape(caption)}</h3><div class=scroll tabindex=0 role=region "
        f'aria-label="{escape(caption)}"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _line(text: str) -> str:
    """Return the place of a line of code, such as `app/orders.py:12`, as HTML.

    In a narrow column, a browser may wrap this text after each slash.
    """
    return escape(text).replace("/", "/<wbr>")


def _class(kind: str) -> str:
    return kind.replace(" ", "-")


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms" if seconds >= _TEN_MS else f"{seconds * 1000:.1f} ms"
