"""Options of networks as they are typed, KEY=VALUE: which of them load a network, which its `inpaint` takes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Values = dict[str, Any]
_WORDS: dict[str, bool | None] = {"true": True, "false": False, "none": None}
_KINDS: tuple[tuple[type, tuple[str, ...]], ...] = (
    (bool, ("bool",)), (int, ("int", "float")), (float, ("float",)), (str, ("str",)), (tuple, ("tuple", "Sequence")),
    (type(None), ("None",)),
)  # fmt: skip

_SAID = {
    "bool": "true or false", "int": "an integer", "float": "a number", "str": "a name", "tuple": "values with commas between",
    "Sequence": "values with commas between", "None": "none",
}  # fmt: skip


def value_of(text: str) -> Any:
    """What a value stands for: true, false, none, an integer, a number, values with commas between them, or itself."""
    if "," in text:
        return tuple(value_of(part) for part in text.split(",") if part)
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def typed(texts: Sequence[str]) -> Values:
    """Options by name. Raises: `ValueError` for a text without a name or a value, and for a name that comes twice."""
    found: Values = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier() or not value:
            raise ValueError(f"option is {text!r}; accepted: KEY=VALUE, such as temperature=0.9")
        if name in found:
            raise ValueError(f"option {name} is given more than once; accepted: once")
        found[name] = value_of(value)
    return found


def divided(options: Mapping[str, Any], network: Callable[..., Any]) -> tuple[Values, Values]:
    """Options that load a `network`, a class, and those that its `inpaint` takes.

    Names that the class does not list are left to it, where it takes any.

    Raises: `ValueError` for a name that neither has, and a value of a kind that is not its.
    """
    making, filling = accepted(network) | {"prefix": {"str"}}, accepted(getattr(network, "inpaint", None))
    others = [p.kind for p in inspect.signature(network).parameters.values()].count(inspect.Parameter.VAR_KEYWORD)
    made: Values = {}
    filled: Values = {}
    for name, value in options.items():
        kinds = filling.get(name) or making.get(name)
        if kinds is None and not others:
            known = ", ".join([*filling, *making])
            raise ValueError(f"option is {name!r}; accepted for {network.__name__}: {known or 'none'}")
        wanted = next(names for kind, names in _KINDS if type(value) is kind)
        if kinds is not None and kinds.isdisjoint(wanted):
            said = ", ".join(text for kind, text in _SAID.items() if kind in kinds)
            raise ValueError(f"option {name} is {value!r}; accepted: {said}")
        (filled if name in filling else made)[name] = value
    return made, filled


def accepted(function: Callable[..., Any] | None) -> dict[str, set[str]]:
    """Optional parameters that can be typed, by name, with the kinds of their values: none that take tensors only."""
    if function is None:
        return {}
    found = {}
    for parameter in inspect.signature(function).parameters.values():
        note = str(parameter.annotation)
        kinds = set(re.findall(r"\w+", re.sub(r"\[.*\]", "", note)))
        if "Tensor" in note:
            kinds -= {"tuple", "Sequence"}
        kinds &= {name for _, names in _KINDS for name in names}
        if parameter.default is not parameter.empty and kinds - {"None"}:
            found[parameter.name] = kinds
    return found
