"""Programs that pip cannot bring: optional on a developer's machine, required in CI."""

import os
import shutil

import pytest

# Debian keeps servers where only root's PATH leads.
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])


def program(name: str) -> str:
    """Where a program is; without it the test is skipped, and fails in CI."""
    found = shutil.which(name, path=_PATH)
    if found is None:
        missing = f"no {name} is installed"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return found
