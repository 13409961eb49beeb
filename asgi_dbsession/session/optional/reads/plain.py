"""Decides if a statement is a plain read: a SELECT built only of parts that cannot write.

The parts are SQLAlchemy's objects, such as columns and tables. The SQL text is not read.
"""

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

# A plain read (a SELECT that cannot write) has only parts of these SQLAlchemy classes. Any other
# part, such as `text()` or FOR UPDATE, may write or lock rows.
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
# The results of `is_plain_read`, by compiled statement. A value is True if the statement cannot
# write. (Weak references in a dictionary are faster than a `WeakKeyDictionary`.)
_known: dict[ref[Compiled], bool] = {}


def is_plain_read(context: ExecutionContext) -> bool:
    """Return True if it is certain that the statement of `context` cannot write.

    Return False for SQL text, and if the rows come through a cursor on the server: on PostgreSQL,
    such a cursor needs a transaction.
    """
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
    # The ORM makes a second SELECT from that of the application, with joins, for example. Check the
    # parts of both, because each may call an SQL function that writes.
    state: Any = getattr(compiled, "compile_state", None)
    made = getattr(state, "statement", None)
    if made is not None and made is not compiled.statement:
        yield from iterate(made)


def _is_plain_element(element: Any, compiled: Compiled) -> bool:
    kind = next(each for each in type(element).__mro__ if not issubclass(each, Annotated))
    if kind is elements.ColumnClause and element.is_literal:
        # `literal_column()` can hold any SQL text, even a call of a function that writes. Only the
        # text `*` is known to be safe: SQLAlchemy uses it in COUNT(*).
        return bool(element.name == "*")
    # Accept SQLAlchemy's own subclasses of `BindParameter` (for LIMIT) and `Join` (for ORM
    # classes). A subclass that the application has made may add any SQL.
    is_variant = issubclass(kind, elements.BindParameter | Join) and _is_of_sqlalchemy(kind)
    if kind not in _PLAIN and not is_variant:
        return False
    if isinstance(getattr(element, "operator", None), custom_op) or has_additions(element):
        return False
    if kind is Select and element is not compiled.statement and is_orm_enabled(element):
        # Return False for an inner SELECT of ORM classes, such as a subquery. The ORM will replace
        # it by another SELECT, which is not known here. The new SELECT may call an SQL function
        # that writes.
        return False
    if any(_is_unquoted(getattr(element, name, None)) for name in ("name", "schema")):
        return False
    return not renders_expressions(getattr(element, "type", None), compiled.dialect)


def _is_unquoted(name: object) -> bool:
    """Return True if the application has given a name with `quote=False`, which may hide a write.

    SQLAlchemy copies such a name into the SQL text as it is. So instead of the name of a table or
    column, the application may have written any SQL, such as a call of a function.
    """
    return isinstance(name, quoted_name) and name.quote is False


def _is_of_sqlalchemy(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "sqlalchemy"
