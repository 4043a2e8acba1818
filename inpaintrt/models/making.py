"""What networks check when they are made."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import fields
from typing import Any


def only_known(network: type, given: Iterable[str], options: Any) -> None:
    """Raises: `TypeError` for names that are neither parameters of a network nor fields of the dataclass of its options."""
    parameters = inspect.signature(network).parameters.values()
    own = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    known = dict.fromkeys([*own, *(field.name for field in fields(options))])
    if unknown := sorted(set(given) - set(known)):
        names = ", ".join(map(repr, unknown))
        raise TypeError(f"{network.__name__} has no option {names}; accepted: {', '.join(known)}")
