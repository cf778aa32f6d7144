"""Filter samples by an expression over columns, such as `condition == 'seen' and n_tokens < 80`.

The expression is parsed as Python and walked node by node: comparisons, `in`, `and`, `or`, `not`, names of
columns and literals are understood, and nothing else is; it is never evaluated. Knows nothing about stores or
labels.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

BoolArray = NDArray[np.bool_]

_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def parse_where(expression: str) -> ast.expr:
    """Return the parsed expression. Raises ValueError, saying which part is not understood."""
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"cannot read the filter {expression!r}: {error.msg}{_EXPECTED}") from error
    _check(tree)
    return tree


_EXPECTED = ". Expected something like: condition == 'seen' and n_tokens < 80"


def _check(node: ast.expr) -> None:
    match node:
        case ast.BoolOp(values=parts):
            for part in parts:
                _check(part)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            _check(operand)
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            for op, right in zip(ops, comparators, strict=True):
                if isinstance(op, ast.In | ast.NotIn):
                    _check_list(right)
                elif type(op) in _COMPARISONS:
                    _check_operand(right)
                else:
                    raise ValueError(f"the filter does not understand `{ast.unparse(node)}`{_EXPECTED}")
            _check_operand(left)
        case ast.Name():
            pass
        case _:
            raise ValueError(f"the filter does not understand `{ast.unparse(node)}`{_EXPECTED}")


def _check_operand(node: ast.expr) -> None:
    if not isinstance(node, ast.Name):
        _literal(node)


def _check_list(node: ast.expr) -> None:
    if not isinstance(node, ast.List | ast.Tuple):
        raise ValueError(
            f"after `in`, the filter expects a list such as ['a', 'b'], got `{ast.unparse(node)}`"
        )
    for item in node.elts:
        _literal(item)


def _literal(node: ast.expr) -> str | int | float | bool:
    try:
        value = ast.literal_eval(node)
    except ValueError:
        value = None
    if not isinstance(value, str | int | float | bool):
        raise ValueError(
            f"the filter expects a column, a text or a number, got `{ast.unparse(node)}`{_EXPECTED}"
        )
    return value


def select(expression: str, columns: Mapping[str, NDArray[Any]], n_samples: int) -> BoolArray:
    """Return bool [n_samples]: where the expression holds.

    columns: arrays [n_samples] by name. Raises ValueError if the expression is not understood, or compares a
    text with a number; LookupError for a column that is not there.
    """

    def column(name: str) -> NDArray[Any]:
        if name not in columns:
            raise LookupError(
                f"the filter names a column {name!r}; the store has {', '.join(sorted(columns))}"
            )
        values = columns[name]
        return values.astype(str) if values.dtype.kind in "OUT" else values

    def operand(node: ast.expr) -> Any:
        return column(node.id) if isinstance(node, ast.Name) else _literal(node)

    def compare(op: ast.cmpop, left: Any, right: ast.expr) -> Any:
        if isinstance(op, ast.In | ast.NotIn):
            assert isinstance(right, ast.List | ast.Tuple)
            found = np.zeros(n_samples, bool)
            for item in right.elts:
                found |= _compare(operator.eq, left, _literal(item), expression)
            return ~found if isinstance(op, ast.NotIn) else found
        return _compare(_COMPARISONS[type(op)], left, operand(right), expression)

    def holds(node: ast.expr) -> BoolArray:
        match node:
            case ast.BoolOp(op=op, values=parts):
                combine = np.logical_and if isinstance(op, ast.And) else np.logical_or
                return np.asarray(combine.reduce([holds(part) for part in parts]))
            case ast.UnaryOp(operand=inner):
                return ~holds(inner)
            case ast.Compare(left=left, ops=ops, comparators=rights):
                operands = [left, *rights]
                results = [
                    compare(op, operand(a), b) for op, a, b in zip(ops, operands, rights, strict=False)
                ]
                return np.broadcast_to(np.logical_and.reduce(results), n_samples)
            case ast.Name(id=name):
                return _truth(column(name), name)
        raise AssertionError(ast.dump(node))

    return holds(parse_where(expression))


def _compare(compare: Callable[[Any, Any], Any], left: Any, right: Any, expression: str) -> Any:
    kinds = [np.asarray(side).dtype.kind in "OUT" for side in (left, right)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"the filter {expression!r} compares a text with a number: quote texts, and only texts"
        )
    return compare(left, right)


def _truth(values: NDArray[Any], name: str) -> BoolArray:
    if values.dtype != np.bool_:
        raise ValueError(
            f"the filter uses {name!r} as true or false, but it holds {values.dtype}: compare it with "
            "something"
        )
    return values
