"""Extracts the code of README and documentation pages, so that tests can run it."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_FILE = re.compile(r"# (\S+\.py)\n")


class Page:
    """One document, and the code in it.

    A block that begins with `# shop.py` begins that file, and the blocks after it continue it. A
    `diff` changes the first file in which it finds what it changes; `@@` divides its hunks.

    Args:
        path: Where it is, from the root of the repository.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.text = (ROOT / path).read_text()

    def blocks(self, language: str = "python", under: str = "") -> list[str]:
        """Return the blocks of the page in one language, in order.

        Args:
            language: What is written behind the three backticks.
            under: Only of the section with this heading.
        """
        text = self._section(under)
        return [block for found, block in _FENCED.findall(text) if found == language]

    def _section(self, under: str) -> str:
        if not under:
            return self.text
        (text,) = re.findall(
            rf"^## {re.escape(under)}\n(.*?)(?=^## |\Z)", self.text, re.DOTALL | re.MULTILINE
        )
        return str(text)

    def commands(self, under: str = "") -> list[str]:
        """Return the lines of its command blocks; `&&` or a backslash continues a line."""
        script = "".join(self.blocks("bash", under)).replace("&&\n", "&&").replace("\\\n", "")
        return [line for line in script.splitlines() if line]

    def answers(self, under: str = "") -> list[tuple[str, str]]:
        """Each request with curl of a section, and the answer in the block below it."""
        blocks = re.findall(
            r"^```bash\n(curl (?:[^\n]|\\\n)*)\n```\n\n```(?:json|text)\n(.*?)\n```$",
            self._section(under),
            re.DOTALL | re.MULTILINE,
        )
        assert len(blocks) == len([each for each in self.commands(under) if "curl" in each])
        return [(command.replace("\\\n", ""), answer) for command, answer in blocks]

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
            for hunk in diff.split("@@\n"):
                before, after = _side(hunk, " -"), _side(hunk, " +")
                name = next(each for each, code in files.items() if before in code)
                assert files[name].count(before) == 1, f"{before} is ambiguous in {self.path}"
                files[name] = files[name].replace(before, after)
        return files


def _side(hunk: str, signs: str) -> str:
    return "".join(each[1:] for each in hunk.splitlines(keepends=True) if each[0] in signs)
