"""Files for contributors and hosted services are complete, and grant few permissions."""

import ast
import re
import tomllib
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


def test_what_the_hosted_services_install_is_locked_by_hash() -> None:
    """And the locks name no index. What a fresh install would bring is only audited."""
    for workflow in WORKFLOWS:
        for line in workflow.read_text().splitlines():
            # Of a Python that is not supported yet; and of today's newest versions, to be audited.
            is_unlocked = "-e '.[test]'" in line or "--target fresh" in line
            if re.search(r"pip (install|download) ", line) and not is_unlocked:
                assert "--require-hashes" in line or "--no-deps --no-build-isolation" in line
    assert 'PIP_NO_INDEX: "1"' in (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    for lock in (ROOT / "requirements").glob("*.txt"):
        text = lock.read_text()
        assert "://" not in text
        for requirement in re.split(r"\n(?=\w)", text.strip()):
            assert re.match(r"[\w.-]+(\[[\w,-]+\])?==[\w.]+", requirement)
            assert "--hash=sha256:" in requirement


def test_the_lock_has_every_dependency() -> None:
    """Else a job without an index would fail."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["test"] + extras["docs"] + extras["example"]
    locked = (ROOT / "requirements" / "ci.txt").read_text()
    names = {re.split(r"[^\w.-]", each)[0].lower() for each in wanted} - {"asgi-dbsession"}
    assert [each for each in names if not re.search(rf"^{each}==", locked, re.MULTILINE)] == []


def test_nobody_is_told_to_install_the_package_from_an_index() -> None:
    """Before the name is claimed there, anyone could claim it."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    told = [
        each
        for each in pages
        if re.search(r"pip install (?!-e )[^\n]*asgi.dbsession", each.read_text())
    ]
    assert told == []


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


def test_a_mark_belongs_to_a_test() -> None:
    """On a helper it does nothing, and the page of what was tested loses a row in silence."""
    marked = {
        f"{file.name}: {function.name}"
        for file in (ROOT / "tests").rglob("*.py")
        for function in ast.walk(ast.parse(file.read_text()))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for decorator in function.decorator_list
        if ast.unparse(decorator).startswith("pytest.mark.")
    }
    assert marked
    assert {each for each in marked if ": test_" not in each} == set()
