"""Open the shop: `python -m example_app`."""

from argparse import ArgumentParser

import uvicorn

from .app import app

HOST = "127.0.0.1"
WELCOME = """\
The shop opens at {address}. Ctrl-C stops it. Order something with each of the
four cards: the busy card needs a second attempt, and the declined and the crashing
card change nothing. Or use another terminal:

  curl {address}/api/products
  curl {address}/api/orders -d '{{"product": 1, "quantity": 2, "card": "approved"}}'
  curl {address}/api/orders -d '{{"product": 1, "quantity": 2, "card": "declined"}}'
  curl {address}/api/mails
  curl {address}/api/sales
  curl {address}/orders.csv

Who holds which database connection: {address}/db/

The network panel of the browser shows, under "Timing", the database time of each page.
"""


def main() -> None:
    """Say what to try, and serve until interrupted."""
    parser = ArgumentParser(prog="python -m example_app", description="A small shop.")
    parser.add_argument("--port", type=int, default=8000, help="where to listen (default: 8000)")
    port = parser.parse_args().port
    print(WELCOME.format(address=f"http://{HOST}:{port}"), flush=True)
    # At Ctrl-C, wait at most five seconds for clients that read slowly.
    uvicorn.run(app, host=HOST, port=port, timeout_graceful_shutdown=5)


if __name__ == "__main__":
    main()
