"""Finds every change of a file that a test should notice."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import unified_diff
from functools import cached_property
from pathlib import Path
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator, operator_names
from parso.python.tree import Keyword

# Operators whose result is the same program, or a TypeError in any test that runs the line.
_POINTLESS = ("BinaryOperator", "Is_Eq", "IsNot_NotEq", "Is_Lt", "Is_Gt", "IsNot_Lt", "IsNot_Gt")
# Here `is` gives the same result as `==`: both names are literals of one word, in SQLAlchemy and in
# this package, and CPython makes only one object of equal literals. (Types of ASGI messages do not
# belong here: a server may build them at run time.)
_SAME_OBJECT = re.compile(r'dialect\.(name|driver) [=!]= "\w+"')
_POINTLESS_ON_SAME_OBJECT = ("Eq_Is", "NotEq_IsNot")
_POINTLESS_DECORATORS = ("@override", "@functools.wraps(operation)")
_LOGGERS = ("_logger", "logger", "logging")


@dataclass(frozen=True)
class Mutation:
    """One change of one file; `file` is relative to the repository."""

    file: str
    line: int
    operator: Operator
    occurrence: int
    before: str

    @cached_property
    def after(self) -> str:
        """The changed text of the file."""
        return str(mutate_code(self.before, self.operator, self.occurrence))

    @property
    def diff(self) -> str:
        """The change as a unified diff; two mutations with the same diff are the same."""
        lines = self.before.splitlines(), self.after.splitlines()
        return "\n".join(unified_diff(*lines, self.file, self.file, lineterm=""))

    def __str__(self) -> str:
        """Return the place and the kind of the mutation."""
        return f"{self.file}:{self.line} {type(self.operator).__name__}"


class RemoveStatement(Operator):  # type: ignore[misc]
    """Replaces a call, an assignment in a function, or a `raise` with `pass`."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        """Return the places of removable statements, as `((line, column), (line, column))`."""
        if node.type == "simple_stmt":
            kind = node.children[0].type
            in_function = node.parent.type == "suite" and node.parent.parent.type != "classdef"
            if kind in ("atom_expr", "raise_stmt") or (kind == "expr_stmt" and in_function):
                yield node.children[0].start_pos, node.children[0].end_pos

    def mutate(self, node: Any, _index: int) -> Any:
        """Return the node without the statement."""
        statement = node.children[0]
        node.children[0] = Keyword("pass", statement.start_pos, statement.get_first_leaf().prefix)
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        """Return None: this operator is not in cosmic-ray's own list."""
        return ()


def mutations_of(root: Path, file: Path) -> Iterator[Mutation]:
    """Return every mutation of a file, except those of types, docstrings and log messages."""
    source = file.read_text()
    skipped = [*_skipped(ast.parse(source))]
    nodes = [*ast_nodes(get_ast(source))]
    for operator in _operators():
        places = [(*each, node) for node in nodes for each in operator.mutation_positions(node)]
        for occurrence, (start, _end, node) in enumerate(places):
            is_skipped = any(first <= start < last for first, last in skipped)
            if not is_skipped and not _is_pointless(operator, node):
                yield Mutation(str(file.relative_to(root)), start[0], operator, occurrence, source)


def _is_pointless(operator: Operator, node: Any) -> bool:
    if node.type == "decorator":
        return node.get_code().strip() in _POINTLESS_DECORATORS
    kind = type(operator).__name__.partition("_")[2]
    return kind in _POINTLESS_ON_SAME_OBJECT and bool(_SAME_OBJECT.search(node.parent.get_code()))


def _operators() -> Iterator[Operator]:
    yield RemoveStatement()
    for name in operator_names():
        operator = get_operator(name)
        if not any(each in name for each in _POINTLESS) and not operator.arguments():
            yield operator()


def _skipped(tree: ast.AST) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Return the places where a change has no effect: from the first position up to the second."""
    for node in ast.walk(tree):
        skipped: list[ast.AST | None] = []
        match node:
            case ast.AnnAssign(annotation=ast.Name(id="TypeAlias")):
                skipped = [node]
            case ast.AnnAssign(annotation=annotation) | ast.arg(annotation=annotation):
                skipped = [annotation]
            case ast.FunctionDef(returns=returns) | ast.AsyncFunctionDef(returns=returns):
                skipped = [returns]
            case ast.Call(func=ast.Name(id="dataclass" | "TypeVar")):
                skipped = [node]
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name)))):
                skipped = [node] if name in _LOGGERS else []
        for each in skipped:
            if isinstance(each, ast.stmt | ast.expr):
                end = (each.end_lineno or each.lineno, each.end_col_offset or 0)
                yield (each.lineno, each.col_offset), end
