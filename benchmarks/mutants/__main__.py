"""Changes lines of the package at random, and lists the changes that no test notices.

    python -m benchmarks.mutants                                  200 mutants
    python -m benchmarks.mutants --count 50 --only '*/session/*'  50 mutants of some files

cosmic-ray makes the mutants: it is in `benchmarks/requirements.txt`. The outcome of each mutant is
kept in a file. The same command later tries only the mutants that survived or are not in this file.
"""

import argparse
import json
import random
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

from .mutations import Mutation, mutations_of
from .trial import copy, survives

_ROOT = Path(__file__).parents[2]
_CORE = "asgi_dbsession/{}/**/*.py"
_ROOMS = ("session", "unit", "asgi", "database")
# The weight of a file in the random choice: code of the two promises comes first.
_WEIGHTS = {"session": 3, "unit": 3, "asgi/middleware": 3, "asgi/exchange": 3}


def drawn(count: int, seed: int, only: str) -> list[Mutation]:
    """Return random mutations of the package; the same seed gives the same mutations."""
    chance = random.Random(seed)
    files = [each for room in _ROOMS for each in sorted(_ROOT.glob(_CORE.format(room)))]
    candidates = [
        (chance.random() ** (1 / _weight(each.file)), number, each)
        for number, each in enumerate(each for file in files for each in mutations_of(_ROOT, file))
        if fnmatch(each.file, only)
    ]
    chosen = [each for *_, each in sorted(candidates, reverse=True)]
    different: dict[str, Mutation] = {}
    for each in chosen:
        if len(different) == count:
            break
        if each.after != each.before:
            different.setdefault(each.diff, each)
    return [*different.values()]


def _weight(file: str) -> int:
    return next((weight for place, weight in _WEIGHTS.items() if f"/{place}" in file), 1)


def main(options: argparse.Namespace) -> None:
    """Try each mutant, write its result to a file, and print the survivors."""
    mutants = drawn(options.count, options.seed, options.only)
    results: dict[str, bool] = {}
    if options.results.exists():
        results = json.loads(options.results.read_text())
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as unchanged, ThreadPoolExecutor(options.jobs) as pool:
        copy(_ROOT, Path(unchanged))
        trials = {
            pool.submit(survives, Path(unchanged), each, near_only=options.near_only): each
            for each in sorted(mutants, key=lambda each: each.diff in results)
            if results.get(each.diff, True)
        }
        for trial in as_completed(trials):
            mutant, survived = trials[trial], trial.result()
            results[mutant.diff] = survived
            options.results.write_text(json.dumps(results, indent=1))
            print("survived" if survived else "killed  ", mutant, flush=True)
            if survived:
                print(mutant.diff, flush=True)
    survivors = sum(results[each.diff] for each in mutants)
    killed = len(mutants) - survivors
    print(f"{killed} of {len(mutants)} killed ({killed / max(len(mutants), 1):.1%})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="how many mutants")
    parser.add_argument("--seed", type=int, default=1, help="which ones")
    parser.add_argument("--jobs", type=int, default=1, help="how many at the same time")
    parser.add_argument("--only", default="*", metavar="GLOB", help="of which files")
    parser.add_argument(
        "--near-only", action="store_true", help="run only the tests closest to each mutant"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=_ROOT / "build" / "mutants.json",
        help="where the outcomes are kept: those that were killed are not tried again",
    )
    main(parser.parse_args())
