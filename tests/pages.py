"""The code that README and docs show, to be run as it stands."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_FILE = re.compile(r"# (\S+\.py)\n")


class Page:
    """One document, and the code in it.

    A block that begins with `# shop.py` begins that file, and the blocks after it continue it. A
    `diff` changes what stands in a file.

    Args:
        path: Where it is, from the root of the repository.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.text = (ROOT / path).read_text()

    def blocks(self, language: str = "python", under: str = "") -> list[str]:
        """Its blocks in one language, in order.

        Args:
            language: What is written behind the three backticks.
            under: Only of the section with this heading.
        """
        text = self.text
        if under:
            (text,) = re.findall(rf"^## {re.escape(under)}\n(.*?)(?=^## |\Z)", text, re.S | re.M)
        return [block for found, block in _FENCED.findall(text) if found == language]

    def run(self, number: int) -> dict[str, Any]:
        """Execute one block as a module of its own."""
        namespace: dict[str, Any] = {"__name__": "pasted"}
        exec(compile(self.blocks()[number], self.path, "exec"), namespace)
        return namespace

    def files(self, *changes: str) -> dict[str, str]:
        """Its files by their names.

        Args:
            *changes: Headings of the sections whose `diff` is to be applied.
        """
        files: dict[str, str] = {}
        name = ""
        for block in self.blocks():
            begins = _FILE.match(block)
            if begins:
                name = begins.group(1)
            files[name] = files[name] + "\n\n" + block if name in files else block
        for change in changes:
            (diff,) = self.blocks("diff", under=change)
            removed, added = (_lines(diff, sign) for sign in "-+")
            (name,) = [each for each, code in files.items() if code.count(removed) == 1]
            files[name] = files[name].replace(removed, added)
        return files


def _lines(diff: str, sign: str) -> str:
    return "".join(each[1:] for each in diff.splitlines(keepends=True) if each.startswith(sign))
