"""Simulates how many connections are needed, and writes the page.

    python -m benchmarks.capacity                      from the figures that are kept
    python -m benchmarks.capacity --measure            after measuring this machine, six minutes
    python -m benchmarks.capacity --quick --write FOLDER   very little of everything

simpy is in the extra `test`.
"""

import argparse
import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvloop

from .lag import Routing, simulate
from .measure import measure
from .overload import SECONDS, limits, reconnections, stops
from .picture import picture
from .report import Figures, Lag, document
from .scale import RATE, WORKERS, needs
from .validate import predicted

_ROOT = Path(__file__).parents[2]
_DOCS = _ROOT / "docs"
_LAGS, _GAPS = (0.1, 1.0, 3.0), (1.0, 5.0)  # seconds


def main(options: argparse.Namespace) -> None:
    """Measure if told so, simulate, and write."""
    kept: Path = _DOCS / "measured" / "capacity.json"
    if options.measure:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            found = runner.run(measure(rounds=4, seconds=0.5, slow=16))
        kept.write_text(json.dumps(found, indent=1))
    speed = json.loads((_DOCS / "measured" / "speed.json").read_text())
    figures = _simulate(options, speed, json.loads(kept.read_text()))
    text = document(figures)
    pictures: Path = options.write / "measured"
    pages: Path = options.write / "explanation"
    for folder in (pictures, pages):
        folder.mkdir(parents=True, exist_ok=True)
    (pages / "how-many-connections.md").write_text(text)
    useful = [(f"{each.timeout:g} s", each.useful) for each in figures.limits]
    for name, columns in (("connections", 2), ("connections-narrow", 1)):
        (pictures / f"{name}.svg").write_text(picture(figures.needs, useful, columns))
    print(text)


def _simulate(
    options: argparse.Namespace, speed: Mapping[str, Any], measured: Mapping[str, Any]
) -> Figures:
    small = 100 if options.quick else 1
    seed, seconds = options.seed, 20 if options.quick else SECONDS
    return Figures(
        command="python -m benchmarks.capacity" + " --quick" * options.quick,
        seed=seed,
        speed=speed,
        measured=measured,
        cells=predicted(measured, seed, quick=options.quick),
        needs=needs(speed, workers=WORKERS // small, rate=RATE / small, seed=seed),
        lags=_lags(2_000 // small, seed),
        limits=limits(seconds, seed),
        stops=stops(seconds, seed),
        reconnections=reconnections(seconds, seed),
    )


def _lags(clients: int, seed: int) -> list[Lag]:
    return [
        Lag(routing, lag, gap, simulate(routing, lag, gap, clients=clients, seconds=100, seed=seed))
        for gap in _GAPS
        for lag in _LAGS
        for routing in Routing
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="measure this machine again")
    parser.add_argument("--quick", action="store_true", help="very little of everything")
    parser.add_argument("--seed", type=int, default=7, help="what all chance follows from")
    parser.add_argument("--write", type=Path, default=_DOCS, metavar="FOLDER")
    main(parser.parse_args())
