"""Runs tools through the plan of faults, and writes the results.

    python -m benchmarks.faults                                      this package, once
    python -m benchmarks.faults --seconds 600 --seed 7               for ten minutes
    python -m benchmarks.faults --all --write docs/explanation/under-faults.md
    python -m benchmarks.faults --soak 100000 --each 3 --write docs/explanation/under-faults.md
    python -m benchmarks.faults --replicas 15 --write docs/explanation/under-faults.md

The last two write only their own section of the document, and the one before keeps these sections.
All counts go to a page beside the document.

The other tools are in `benchmarks/requirements.txt`.
"""

import argparse
import asyncio
import json
import sys
from math import ceil
from pathlib import Path

import uvloop

from .check import CASES
from .cluster import Cluster
from .failover import Failover, fail_over
from .ledger import begin_anew
from .plan import FAULTS, faults_in_order
from .replicas_report import HEADING as REPLICAS, section
from .report import appendix, document, in_detail
from .run import Result, run_tool, running_cluster
from .sections import kept_section, replace_section
from .soak import Soak, soak
from .soak_report import HEADING as SOAK, soaked
from .stale_reads import FAULTS as FAULTS_OF_REPLICAS, watch_all
from .tools import TOOLS

_DRIVERS = ("asyncpg", "psycopg")


async def main(options: argparse.Namespace) -> None:
    """Run the requested tests, one tool after the other."""
    tools = list(TOOLS) if options.all else options.tools
    results: dict[str, list[Result]] = {}
    checks: dict[str, dict[str, str]] = {}
    failovers: dict[tuple[str, str], Failover] = {}
    async with running_cluster() as cluster:
        for tool in tools:
            rounds = max(1, ceil(options.seconds / options.each / len(FAULTS)))
            faults = faults_in_order(options.seed, rounds)
            results[tool] = await run_tool(
                tool,
                faults,
                seed=options.seed,
                seconds=options.each,
                cluster=cluster,
                driver=options.driver,
            )
            print(f"{TOOLS[tool]}\n\n{in_detail(results[tool])}", flush=True)
            checks[tool] = await _check(tool, cluster, options.driver)
    for tool in tools:
        for driver in _DRIVERS if tool == "asgi_dbsession" else (options.driver,):
            failover = failovers[tool, driver] = await fail_over(tool, driver, seconds=2)
            print(f"failover, {TOOLS[tool]}, {driver}: {failover.gap} s, {failover.finding}")
    if options.write is not None:
        command = _command()
        kept = {"replicas": REPLICAS, "soak": SOAK}
        sections = {name: kept_section(options.write, each) for name, each in kept.items()}
        text = document(command, results, checks, failovers, **sections)
        await asyncio.to_thread(options.write.write_text, text)
        details = options.write.with_stem(f"{options.write.stem}-in-detail")
        await asyncio.to_thread(details.write_text, appendix(command, results))


async def soak_both(options: argparse.Namespace) -> None:
    """Run this package under all faults, with each driver for half of the writes."""
    soaks: list[Soak] = []
    writes = -(-options.soak // len(_DRIVERS))
    for driver in _DRIVERS:
        async with running_cluster() as cluster:
            soaks.append(
                await soak(
                    driver,
                    cluster,
                    seed=options.seed,
                    seconds=options.each,
                    writes=writes,
                    faults=-(-writes // 10),
                )
            )
    _write_section(options, soaked(_command(), soaks))


async def count_stale_reads(options: argparse.Namespace) -> None:
    """Run this package and hand-written routers on a primary and two replicas, under each fault."""
    found = await watch_all(FAULTS_OF_REPLICAS, options.replicas)
    _write_section(options, section(_command(), options.replicas, found))


def _write_section(options: argparse.Namespace, text: str) -> None:
    print(text)
    if options.write is not None:
        replace_section(options.write, text)


def _command() -> str:
    return f"python -m benchmarks.faults {' '.join(sys.argv[1:])}"


async def _check(tool: str, cluster: Cluster, driver: str) -> dict[str, str]:
    await begin_anew(cluster)
    arguments = ("-m", "benchmarks.faults.check", tool, cluster.url(driver))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    printed, _ = await process.communicate()
    answers: dict[str, str] = json.loads(printed.splitlines()[-1])
    for case in CASES:
        print(f"  {case}: {answers[case] or 'fine'}")
    return answers


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tools", nargs="*", default=["asgi_dbsession"], metavar="TOOL")
    parser.add_argument("--all", action="store_true", help=f"all tools: {', '.join(TOOLS)}")
    parser.add_argument("--seed", type=int, default=7, help="what all chance follows from")
    parser.add_argument(
        "--seconds", type=float, default=0, help="for each tool, about; 0: each fault once"
    )
    parser.add_argument("--each", type=float, default=1.5, help="seconds for each fault")
    parser.add_argument("--driver", default="asyncpg", help="asyncpg or psycopg")
    parser.add_argument(
        "--soak",
        type=int,
        default=0,
        metavar="WRITES",
        help="this package alone, with both drivers, until so many writes are acknowledged",
    )
    parser.add_argument(
        "--replicas",
        type=float,
        default=0,
        metavar="SECONDS",
        help="stale reads from replicas, so many seconds for each fault and router",
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="where the tables go")
    given = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        run = soak_both if given.soak else count_stale_reads if given.replicas else main
        runner.run(run(given))
