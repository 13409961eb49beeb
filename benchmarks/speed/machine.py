"""Describes the machine and the versions of a measurement."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.faults.tools import versions


def described() -> dict[str, Any]:
    """Return the date, the versions and the processors."""
    loop = ", ".join(f"{name} {version(name)}" for name in ("uvloop", "httptools", "psycopg"))
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": f"Python {platform.python_version()}, {versions()}, {loop}",
        "machine": f"{os.cpu_count()} processors ({_processor()}), {platform.system()}",
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
