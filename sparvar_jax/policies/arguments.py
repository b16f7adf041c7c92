"""Arguments of policies, from plan texts and from Python, held to the policies' annotations.

A policy says in its signature what it takes; `checked` holds it to that, so that a wrong argument
is refused by name before anything is made of it.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

import numpy as np

from sparvar_jax.weights.numbers import real, whole
from sparvar_jax.weights.told import shown

Make = TypeVar("Make", bound=Callable[..., Any])

MOST_ENTRIES = 256
LARGEST = 1 << 20
_WORDS = {
    int: f"a whole number up to {LARGEST}",
    float: "a finite number",
    str: "a text",
    bool: "True or False",
}


def checked(make: Make) -> Make:
    """The policy with its arguments checked: ValueError that names the argument, and the mend.

    Known annotations are int, float, bool, str, None, literals, tuples of these, alternatives, and
    `Unpack` of a TypedDict for further keywords; arguments with other annotations pass as they are.
    Whole numbers of other libraries become Python's.
    """
    if hasattr(make, "__checked__"):
        return make
    try:
        signature, hints = inspect.signature(make), get_type_hints(make)
    except (NameError, TypeError, ValueError):  # nothing to hold it to
        return make
    name = getattr(make, "__name__", "policy")

    @functools.wraps(make)
    def call(*positional: Any, **named: Any) -> Any:
        try:
            bound = signature.bind(*positional, **named)
        except TypeError as error:
            raise ValueError(f"{name}: {error}; it takes {_described(signature)}") from None
        for parameter, value in bound.arguments.items():
            kind, hint = signature.parameters[parameter].kind, hints.get(parameter, Any)
            if kind is inspect.Parameter.VAR_KEYWORD:
                bound.arguments[parameter] = _keywords(name, hint, value)
            elif kind is inspect.Parameter.VAR_POSITIONAL:
                bound.arguments[parameter] = tuple(_one(name, parameter, hint, v) for v in value)
            else:
                bound.arguments[parameter] = _one(name, parameter, hint, value)
        return make(*bound.args, **bound.kwargs)

    call.__checked__ = True  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def _described(signature: inspect.Signature) -> str:
    """The names of all arguments."""
    return ", ".join(signature.parameters) or "no arguments"


def _keywords(policy: str, hint: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Further keywords, checked where the annotation says which there are."""
    fields = get_args(hint)[0] if get_args(hint) else hint
    if not is_typeddict(fields):
        return given
    hints = get_type_hints(fields)
    unknown = sorted(set(given) - set(hints))
    if unknown:
        raise ValueError(
            f"{policy} has no argument {shown(unknown[0])}: it takes {', '.join(hints)} as well"
        )
    return {key: _one(policy, key, hints[key], value) for key, value in given.items()}


def _one(policy: str, argument: str, hint: Any, value: Any) -> Any:
    """A value as its annotation says; ValueError that names policy and argument."""
    fits, found = _fitting(hint, value)
    if not fits:
        raise ValueError(f"{policy}: {argument} must be {_wanted(hint)}, got {shown(value)}")
    return found


def _fitting(hint: Any, value: Any) -> tuple[bool, Any]:
    """(whether a value fits an annotation, the value as Python's own)."""
    if get_origin(hint) in (Union, types.UnionType):
        tried = (_fitting(option, value) for option in get_args(hint))
        return next((found for found in tried if found[0]), (False, value))
    if get_origin(hint) is Literal:
        fits = any(type(value) is type(each) and value == each for each in get_args(hint))
        return fits, value
    if get_origin(hint) is tuple:
        return _fitting_tuple(get_args(hint), value)
    if hint in (types.NoneType, None):
        return value is None, value
    if hint is int or hint is float:
        return _number(hint, value)
    if hint is bool or hint is str:
        plain = isinstance(value, hint) or (hint is bool and isinstance(value, np.bool_))
        return plain, hint(value) if plain else value
    return True, value


def _fitting_tuple(hints: tuple[Any, ...], value: Any) -> tuple[bool, Any]:
    if not isinstance(value, tuple | list) or len(value) > MOST_ENTRIES:
        return False, value
    each = (hints[0],) * len(value) if hints[-1] is Ellipsis else hints
    if len(each) != len(value):
        return False, value
    found = [_fitting(hint, entry) for hint, entry in zip(each, value, strict=True)]
    return all(fits for fits, _ in found), tuple(entry for _, entry in found)


def _number(hint: type, value: Any) -> tuple[bool, Any]:
    """Whole numbers stand for themselves as a number too; True and "3" are none."""
    if isinstance(value, str | bytes):
        return False, value
    try:
        read = whole if hint is int else real
        return True, read("number", value, -LARGEST, LARGEST)
    except ValueError:
        return False, value


def _wanted(hint: Any) -> str:
    """What an annotation asks for, in words."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_wanted(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        options = get_args(hint)
        if len(options) < 3:
            return " or ".join(map(repr, options))
        *first, last = map(str, options)
        return f"{', '.join(first)} or {last}"
    if get_origin(hint) is tuple:
        hints = get_args(hint)
        if hints[-1] is Ellipsis:
            return f"a list (at most {MOST_ENTRIES}) with {_wanted(hints[0])} each"
        return f"({', '.join(_wanted(each) for each in hints)})"
    return _WORDS.get(hint, "None" if hint in (types.NoneType, None) else "something else")
