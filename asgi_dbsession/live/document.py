"""Makes the HTML of the web page that shows database connections, with its style and script."""

from functools import cache
from html import escape
from importlib.resources import files

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Database connections</title>
<noscript><meta http-equiv="refresh" content="2"></noscript>
<style nonce="{nonce}">{style}</style>
</head>
<body>
<header>
<h1>Database connections</h1>
<p id="summary" aria-hidden="true">{summary}</p>
<p id="status" class="unseen" aria-live="polite">{summary}</p>
<nav aria-label="Other forms">
<button id="pause" type="button" aria-pressed="false" hidden>Pause</button>
<a href="?json">JSON</a> <a href="?metrics">Metrics</a>
</nav>
</header>
<main>
<section aria-labelledby="first"><h2 id="first">Look here first</h2>
<div id="findings">{findings}</div></section>
<section aria-labelledby="present"><h2 id="present">Now</h2>
<div id="now">{now}</div></section>
<section aria-labelledby="past"><h2 id="past">Just now</h2>
<p class="legend"><span class="wait">waits for a connection</span><span class="statement">at \
work</span><span class="hold">holds it idle</span><span class="commit">COMMIT</span><span \
class="rollback">ROLLBACK</span></p>
<div id="timeline">{timeline}</div>
<div id="recent">{recent}</div></section>
</main>
<script nonce="{nonce}">{script}</script>
</body>
</html>
"""


def render(nonce: str, summary: str, parts: dict[str, str]) -> str:
    """Return the HTML of the web page that shows how the database connections are used now.

    Args:
        nonce: A random text for this response. Browsers use a style or script only if it has this
            text.
        summary: How many connections of each database are in use, and how many requests wait for
            one, as plain text.
        parts: The HTML of the parts of the page. The keys are the names of the parts, such as
            `now`.
    """
    own = {"style": _asset("page.css"), "script": _asset("page.js")}
    return _PAGE.format(nonce=nonce, summary=escape(summary), **own, **parts)


@cache
def _asset(name: str) -> str:
    return (files("asgi_dbsession.live") / name).read_text("utf-8")
