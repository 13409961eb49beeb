"""Keeps or replaces a section of the document that a run of its own writes."""

import re
from pathlib import Path


def kept_section(file: Path, heading: str) -> str:
    """Return the present section of the document below this heading."""
    text = file.read_text() if file.exists() else ""
    found = _section(heading).search(text)
    return found.group().rstrip() if found else f"{heading}\n\nNot run yet."


def replace_section(file: Path, section: str) -> None:
    """Replace the section of the document with the same heading, or add it at the end."""
    heading, _, _ = section.partition("\n")
    text = file.read_text()
    found = _section(heading).search(text)
    start, end = found.span() if found else (len(text), len(text))
    rest = text[end:]
    file.write_text(f"{text[:start]}{section.rstrip()}\n" + (f"\n{rest}" if rest else ""))


def _section(heading: str) -> re.Pattern[str]:
    """A section ends before the next heading of its level."""
    return re.compile(rf"^{re.escape(heading)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
