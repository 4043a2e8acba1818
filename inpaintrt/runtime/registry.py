"""The ops that exist. Filled when `inpaintrt.ops` is imported, read-only afterwards."""

from __future__ import annotations

from .spec import OpSpec

_specs: dict[str, OpSpec] = {}


def add(spec: OpSpec) -> None:
    if spec.name in _specs:
        raise ValueError(f"op {spec.name!r} is registered twice")
    _specs[spec.name] = spec


def get(name: str) -> OpSpec:
    return _specs[name]


def names() -> tuple[str, ...]:
    return tuple(_specs)
