"""The roles of captures in rows, each with the last reported state and the last dispatch."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from owner.core.tables import NO_CAPTURE, Rows, Tables
from owner.core.transitions import Role
from tablewire.model.columns import U8

_COLUMNS = {Role.PRIMARY: "primary", Role.SECONDARY: "secondary"}
Field = Literal["reported", "dispatch"]


def roles_of(tables: Tables, rows: Rows, capture: int) -> U8:
    """Return the Role of the capture in each row; shape (len(rows),)."""
    roles = np.zeros(len(rows), np.uint8)
    roles[tables.primary[rows] == capture] = Role.PRIMARY
    roles[tables.secondary[rows] == capture] = Role.SECONDARY
    for at in np.flatnonzero(tables.undetermined_count[rows]).tolist():
        if capture in tables.undetermined[int(rows[at])]:
            roles[at] = Role.UNDETERMINED
    return roles


def get_field(tables: Tables, field: Field, rows: Rows, roles: U8, capture: int) -> npt.NDArray[np.int64]:
    """Return what is recorded with the role of the capture in each row, 0 where it has none."""
    values = np.zeros(len(rows), np.int64)
    for role, column in _COLUMNS.items():
        mask = roles == role
        values[mask] = getattr(tables, f"{column}_{field}")[rows[mask]]
    for at in np.flatnonzero(roles == Role.UNDETERMINED).tolist():
        values[at] = getattr(tables.undetermined[int(rows[at])][capture], field)
    return values


def set_field(tables: Tables, field: Field, rows: Rows, roles: U8, capture: int, values: npt.ArrayLike) -> None:
    """Record values, for each row or one for all, with the role of the capture."""
    values = np.broadcast_to(values, len(rows))
    for role, column in _COLUMNS.items():
        mask = roles == role
        getattr(tables, f"{column}_{field}")[rows[mask]] = values[mask]
    for at in np.flatnonzero(roles == Role.UNDETERMINED).tolist():
        setattr(tables.undetermined[int(rows[at])][capture], field, int(values[at]))


def assign(
    tables: Tables, rows: Rows, role: Role, captures: npt.ArrayLike, reported: npt.ArrayLike = 0, dispatches: npt.ArrayLike = 0
) -> None:
    """Give a capture the role, which must be free; the arguments are for each row or for all."""
    if role is Role.UNDETERMINED:
        tables.add_undetermined(rows, captures, reported, dispatches)
        return
    column = _COLUMNS[role]
    getattr(tables, column)[rows] = captures
    getattr(tables, f"{column}_reported")[rows] = reported
    getattr(tables, f"{column}_dispatch")[rows] = dispatches


def clear(tables: Tables, rows: Rows, roles: U8 | Role, capture: int = NO_CAPTURE) -> None:
    """End the role of a capture in each row. capture: needed for Undetermined only."""
    for role in _COLUMNS:
        held = rows[roles == np.full(len(rows), role)]
        assign(tables, held, role, NO_CAPTURE)
        if role is Role.PRIMARY:
            tables.in_snapshot[held] = False
    tables.clear_undetermined(rows[roles == np.full(len(rows), Role.UNDETERMINED)].tolist(), capture)
