"""Runs other programs: those that pip cannot install are required in CI only."""

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

# Let a pytest in another process load the plugins of its command only: all of them take a second.
FEW_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
# Debian puts servers into directories that only root's PATH contains.
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])


def program(name: str) -> str:
    """Return the path of a program; without it, skip the test, or fail in CI."""
    return shutil.which(name, path=_PATH) or _miss(name)


def library(name: str) -> str:
    """Return the path of a library; without it, skip the test, or fail in CI."""
    return next((str(each) for each in Path("/usr").glob(f"lib*/**/{name}")), "") or _miss(name)


def _miss(name: str) -> NoReturn:
    missing = f"no {name} is installed"
    if os.environ.get("CI") == "true":
        pytest.fail(missing)
    pytest.skip(missing)
