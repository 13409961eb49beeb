"""Files for contributors and hosted services are complete, and grant few permissions."""

import re
from pathlib import Path

import pytest
from pages import ROOT, Page

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: str(path.name))
def test_every_action_is_pinned_and_gets_the_least(workflow: Path) -> None:
    """Actions are pinned to a commit hash; workflows may only read, and keep no credentials."""
    text = workflow.read_text()
    used = re.findall(r"uses: (\S+)(.*)", text)
    assert used
    for action, comment in used:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action)
        assert re.fullmatch(r" # v[\d.]+", comment)
    assert "\npermissions:\n  contents: read\n" in text
    assert text.count("actions/checkout@") == text.count("persist-credentials: false")
    assert "secrets." not in text


@pytest.mark.parametrize(
    "name",
    ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "RELEASING.md"],
)
def test_every_link_of_the_project_leads_somewhere(name: str) -> None:
    """Each link leads to a file in the repository."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", Page(name).text)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_hooks_run_what_the_build_runs() -> None:
    """The hook uses the same version, so both accept the same code."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    build = (ROOT / ".ci" / "run").read_text()
    for command in (".venv/bin/ruff check", ".venv/bin/ruff format", ".venv/bin/mypy"):
        assert command in hooks
        assert command in build


def test_a_bug_is_reported_with_versions_and_an_example() -> None:
    """Without these fields, each first answer to an issue would have to ask for them."""
    form = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text()
    for field in ("versions", "example"):
        (asked,) = re.findall(rf"id: {field}\n(.*?)(?=\n  - type|\Z)", form, re.DOTALL)
        assert "required: true" in asked
