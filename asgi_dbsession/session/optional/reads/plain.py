"""Decides if a statement only reads, by its SQLAlchemy objects and not by its SQL text."""

from collections.abc import Iterator
from typing import Any
from weakref import ref

from sqlalchemy import Column, CompoundSelect, Join, Select, Table
from sqlalchemy.engine import ExecutionContext
from sqlalchemy.sql import elements, functions, selectable
from sqlalchemy.sql.annotation import Annotated
from sqlalchemy.sql.compiler import Compiled
from sqlalchemy.sql.elements import quoted_name
from sqlalchemy.sql.operators import custom_op
from sqlalchemy.sql.visitors import iterate

from asgi_dbsession.session._sqlalchemy import (
    has_additions,
    is_orm_enabled,
    is_server_side,
    renders_expressions,
)

# The classes of SQLAlchemy from which a statement may be built if it only reads. Everything else
# may write: other functions, FOR UPDATE, SQL text, literal columns, common table expressions, and
# new classes of later SQLAlchemy versions.
_PLAIN = frozenset(
    {
        Column,
        CompoundSelect,
        Join,
        Select,
        Table,
        elements.BinaryExpression,
        elements.BindParameter,
        elements.BooleanClauseList,
        elements.Case,
        elements.Cast,
        elements.ClauseList,
        elements.ColumnClause,
        elements.ExpressionClauseList,
        elements.False_,
        elements.Grouping,
        elements.Label,
        elements.Null,
        elements.True_,
        elements.Tuple,
        elements.TypeClause,
        elements.TypeCoerce,
        elements.UnaryExpression,
        functions.count,
        functions.max,
        functions.min,
        functions.sum,
        selectable.Alias,
        selectable.Exists,
        selectable.FromGrouping,
        selectable.ScalarSelect,
        selectable.SelectStatementGrouping,
        selectable.Subquery,
        selectable.TableClause,
    }
)
# Stores for each compiled statement if it only reads. (A `WeakKeyDictionary` would be slower.)
_known: dict[ref[Compiled], bool] = {}


def is_plain_read(context: ExecutionContext) -> bool:
    """Return True if all parts of the statement are of classes that cannot write."""
    compiled: Compiled | None = context.compiled
    if compiled is None or is_server_side(context):
        return False
    found = _known.get(ref(compiled))
    if found is None:
        found = _known[ref(compiled, _known.pop)] = all(
            _is_plain_element(element, compiled) for element in _elements_of(compiled)
        )
    return found


def _elements_of(compiled: Compiled) -> Iterator[Any]:
    yield from iterate(compiled.statement)
    # For eager loading, the ORM makes a second SELECT with joins. Check the parts of both SELECTs.
    state: Any = getattr(compiled, "compile_state", None)
    made = getattr(state, "statement", None)
    if made is not None and made is not compiled.statement:
        yield from iterate(made)


def _is_plain_element(element: Any, compiled: Compiled) -> bool:
    kind = next(each for each in type(element).__mro__ if not issubclass(each, Annotated))
    if kind is elements.ColumnClause and element.is_literal:
        # A literal column is SQL text of the application. Only `*` is known to be safe, as in
        # COUNT(*) and EXISTS (SELECT *).
        return bool(element.name == "*")
    # SQLAlchemy uses a subclass of `BindParameter` for LIMIT and OFFSET, and a subclass of `Join`
    # for joins of ORM classes. These subclasses cannot write either.
    is_variant = issubclass(kind, elements.BindParameter | Join) and _is_of_sqlalchemy(kind)
    if kind not in _PLAIN and not is_variant:
        return False
    if isinstance(getattr(element, "operator", None), custom_op) or has_additions(element):
        return False
    if kind is Select and element is not compiled.statement and is_orm_enabled(element):
        # The ORM will replace this inner SELECT by another SELECT when it makes the SQL text. The
        # parts of that other SELECT are not known here, and may write.
        return False
    if any(_is_unquoted(getattr(element, name, None)) for name in ("name", "schema")):
        return False
    return not renders_expressions(getattr(element, "type", None), compiled.dialect)


def _is_unquoted(name: object) -> bool:
    """Return True if the name is written without quotes, so that it may be any SQL text."""
    return isinstance(name, quoted_name) and name.quote is False


def _is_of_sqlalchemy(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "sqlalchemy"
