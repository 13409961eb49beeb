"""Programs that pip cannot bring: optional on a developer's machine, required in CI."""

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

# Debian keeps servers where only root's PATH leads.
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])


def program(name: str) -> str:
    """Where a program is; without it the test is skipped, and fails in CI."""
    return shutil.which(name, path=_PATH) or _miss(name)


def library(name: str) -> str:
    """The same for a library that a program loads."""
    return next((str(each) for each in Path("/usr").glob(f"lib*/**/{name}")), "") or _miss(name)


def _miss(name: str) -> NoReturn:
    missing = f"no {name} is installed"
    if os.environ.get("CI") == "true":
        pytest.fail(missing)
    pytest.skip(missing)
