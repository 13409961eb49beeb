"""Run the tests of the page on Sentry in a process of their own.

Sentry patches frameworks, SQLAlchemy and `logging` for the rest of a process. No other test should
run with these patches.
"""

import os
import subprocess
import sys
from pathlib import Path

from machine import FEW_PLUGINS
from pages import ROOT


def test_sentry_gets_the_error_that_happened() -> None:
    """Each test of `sentry_cases.py` passes."""
    cases = Path(__file__).with_name("sentry_cases.py")
    plugins = ("-p", "anyio", "-p", "timeout", "-p", "xdist")
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-q", *plugins, str(cases)],
        cwd=ROOT,
        env=os.environ | FEW_PLUGINS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "7 passed" in finished.stdout
