"""Measures the tools, and writes the results.

    python -m benchmarks.speed                          17 minutes, into docs/measured
    python -m benchmarks.speed --quick --write FOLDER   to see that it works
    python -m benchmarks.speed --again                  the document and the picture once more

The other tools are in `benchmarks/requirements.txt`; who is not installed is left out.
"""

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

from .machine import described
from .measure import measure
from .picture import picture
from .report import document
from .size import QUICK, Size

_FOLDER = Path(__file__).parents[2] / "docs" / "measured"


def main(options: argparse.Namespace) -> None:
    """Measure, unless an option says otherwise, and write the document."""
    figures: Path = options.write / "speed.json"
    if not options.again:
        command = "python -m benchmarks.speed" + " --quick" * options.quick
        measured = asyncio.run(measure(QUICK if options.quick else Size()))
        options.write.mkdir(parents=True, exist_ok=True)
        figures.write_text(json.dumps({**described(), "command": command, **measured}, indent=1))
    found: dict[str, Any] = json.loads(figures.read_text())
    text = document(found)
    (options.write / "speed.md").write_text(text)
    (options.write / "speed.svg").write_text(picture(found, columns=2))
    (options.write / "speed-narrow.svg").write_text(picture(found, columns=1))
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="very little of everything")
    parser.add_argument("--again", action="store_true", help="measure nothing")
    parser.add_argument("--write", type=Path, default=_FOLDER, metavar="FOLDER")
    main(parser.parse_args())
