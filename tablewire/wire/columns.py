"""Columns of numbers as bytes: the forms that v1/schedule.proto explains at `Column`. No per-element Python.

Packing looks for the cheapest form: one constant; frame of reference (base and narrow deltas, 0 kept apart); the same with the
stragglers as exceptions. Unpacking checks every length and range before it returns, and names the field in its CodecError.
The arrays that it returns are read-only: nobody writes to the columns of a message.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from tablewire.errors import CodecError
from tablewire.model.columns import I64, U64

EXCEPTION_BYTES: Final = 12
"""What one exception costs: its position (4) and its value (8)."""
MIN_ROWS_TO_SEARCH: Final = 16
"""Below, the plain form is taken without looking for a cheaper one."""

_U64_MAX: Final = 2**64 - 1
_SIGN: Final = np.uint64(1 << 63)
_POSITION: Final = np.dtype("<u4")
_VALUE: Final = np.dtype("<u8")
_DELTAS: Final = {width: np.dtype(f"<u{width}") for width in (1, 2, 4, 8)}

_Scalar = TypeVar("_Scalar", bound=np.generic)


def pack(column: Any, values: npt.NDArray[Any], name: str, dtype: type[np.generic], rows: int) -> None:
    """Fills a pb Column with `values`, which must be `rows` unsigned elements of `dtype` (else CodecError: our caller's bug)."""
    check_array(values, name, dtype, rows)
    if rows:
        _pack_u64(column, values.astype(np.uint64, copy=False))


def pack_signed(column: Any, values: I64, name: str, rows: int) -> None:
    """As `pack`, for int64."""
    check_array(values, name, np.int64, rows)
    if rows:
        _pack_u64(column, values.astype(np.int64, copy=False).view(np.uint64) ^ _SIGN)


def check_array(values: npt.NDArray[Any], name: str, dtype: type[np.generic], rows: int) -> None:
    """CodecError when a column that is to be sent has another type or length than it must have."""
    if not isinstance(values, np.ndarray) or values.dtype != np.dtype(dtype):
        raise CodecError(
            f"{name}: a column of {np.dtype(dtype)} is wanted, not {getattr(values, 'dtype', type(values).__name__)}"
        )
    if values.shape != (rows,):
        raise CodecError(f"{name}: shape {values.shape}, wanted ({rows},)")


def unpack(column: Any, name: str, dtype: type[_Scalar], rows: int) -> npt.NDArray[_Scalar]:
    """The `rows` elements of a pb Column as an unsigned `dtype`; CodecError names what does not fit."""
    if not rows:
        if column.base or column.width or column.deltas or column.positions or column.values:
            raise CodecError(f"{name}: a column of 0 elements holds data")
        return _frozen(np.empty(0, dtype))
    values = _unpack_u64(column, name, rows)
    if np.dtype(dtype) != values.dtype:
        largest = int(values.max())
        if largest > np.iinfo(dtype).max:  # type: ignore[type-var]
            raise CodecError(f"{name}: {largest} does not fit {np.dtype(dtype)}")
    return _frozen(values.astype(dtype, copy=False))


def unpack_signed(column: Any, name: str, rows: int) -> I64:
    """As `unpack`, for int64."""
    return _frozen((unpack(column, name, np.uint64, rows) ^ _SIGN).view(np.int64))


def require_ascending(positions: npt.NDArray[Any], limit: int, name: str) -> None:
    """CodecError unless the (unsigned) positions grow strictly and stay below `limit`."""
    if len(positions) == 0:
        return
    if len(positions) > 1 and not bool((positions[1:] > positions[:-1]).all()):
        raise CodecError(f"{name}: positions are not strictly ascending")
    if int(positions[-1]) >= limit:
        raise CodecError(f"{name}: position {int(positions[-1])} is outside of {limit} rows")


def _frozen(values: npt.NDArray[_Scalar]) -> npt.NDArray[_Scalar]:
    values.flags.writeable = False
    return values


# ---------------------------------------------------------------------------------------------------------------------
# Packing


def _pack_u64(column: Any, values: U64) -> None:
    lowest, highest = int(values.min()), int(values.max())
    if lowest == highest:
        column.base = lowest
        return
    # 0 wraps to the top here, so this is the least element that is not 0, less one: the base at which it is delta 1.
    base = lowest - 1 if lowest else int((values - np.uint64(1)).min())
    width = _width(highest - base)
    if len(values) >= MIN_ROWS_TO_SEARCH:
        width, base, stragglers = _cheapest(values, lowest, highest, base, width)
    else:
        stragglers = None
    column.base = base
    column.width = width
    if width:
        deltas = values - np.uint64(base)
        if lowest == 0:
            deltas[values == 0] = 0
        if stragglers is not None:
            deltas[stragglers] = 0
        column.deltas = deltas.astype(_DELTAS[width]).tobytes()
    if stragglers is not None:
        positions = np.flatnonzero(stragglers)
        column.positions = positions.astype(_POSITION).tobytes()
        column.values = values[positions].astype(_VALUE).tobytes()


def _width(largest_delta: int) -> int:
    return next(width for width in (1, 2, 4, 8) if largest_delta < 1 << (8 * width))


def _cheapest(values: U64, lowest: int, highest: int, base: int, width: int) -> tuple[int, int, npt.NDArray[np.bool_] | None]:
    """(width, base, mask of the exceptions or None): the plain form, or a narrower one anchored at the low or the high end.

    A narrower form has at least the exceptions of a wider one with the same anchor, so the search ends at the first width
    whose exceptions alone cost more than the best form.
    """
    best_cost = len(values) * width
    best: tuple[int, int, npt.NDArray[np.bool_] | None] = (width, base, None)
    open_anchors = [True, True]
    for narrower in (4, 2, 1, 0):
        if narrower >= width:
            continue
        for anchor, candidate in enumerate(_anchored(values, narrower, lowest, highest, base)):
            if not open_anchors[anchor]:
                continue
            candidate_base, stragglers = candidate
            exceptions_cost = int(np.count_nonzero(stragglers)) * EXCEPTION_BYTES
            if exceptions_cost >= best_cost:
                open_anchors[anchor] = False
            elif exceptions_cost + len(values) * narrower < best_cost:
                best_cost = exceptions_cost + len(values) * narrower
                best = (narrower, candidate_base, stragglers)
        if not any(open_anchors):
            break
    return best


def _anchored(
    values: U64, width: int, lowest: int, highest: int, base: int
) -> tuple[tuple[int, npt.NDArray[np.bool_]], tuple[int, npt.NDArray[np.bool_]]]:
    """For one width: (base, exceptions) with the base at the low end, and with the top of the range at the high end."""
    if width == 0:
        return (lowest, values != np.uint64(lowest)), (highest, values != np.uint64(highest))
    reach = (1 << (8 * width)) - 1
    # A narrower width than the plain form's: reach < highest - base, so neither sum nor difference leaves 64 bits.
    low = values > np.uint64(base + reach)
    high = values <= np.uint64(highest - reach)
    if lowest == 0:
        high &= values != 0
    return (base, low), (highest - reach, high)


# ---------------------------------------------------------------------------------------------------------------------
# Unpacking


def _unpack_u64(column: Any, name: str, rows: int) -> U64:
    width, base, data = column.width, column.base, column.deltas
    if width != 0 and width not in _DELTAS:
        raise CodecError(f"{name}.width: {width} is not one of 0, 1, 2, 4, 8")
    if len(data) != rows * width:
        raise CodecError(f"{name}.deltas: {len(data)} bytes, wanted {rows} x {width}")
    if width == 0:
        values = np.full(rows, base, np.uint64)
    else:
        deltas = np.frombuffer(data, _DELTAS[width])
        values = deltas.astype(np.uint64)
        if base:
            if base + int(deltas.max()) > _U64_MAX:
                raise CodecError(f"{name}: base + delta exceeds 64 bits")
            values += np.uint64(base)
            if int(deltas.min()) == 0:
                values[deltas == 0] = 0
    if column.positions or column.values:
        _put_exceptions(values, column.positions, column.values, name)
    return values


def _put_exceptions(values: U64, positions_data: bytes, values_data: bytes, name: str) -> None:
    count, rest = divmod(len(positions_data), _POSITION.itemsize)
    if rest:
        raise CodecError(f"{name}.positions: {len(positions_data)} bytes is not a multiple of {_POSITION.itemsize}")
    if len(values_data) != count * _VALUE.itemsize:
        raise CodecError(f"{name}.values: {len(values_data)} bytes, wanted {count} x {_VALUE.itemsize}")
    positions = np.frombuffer(positions_data, _POSITION)
    require_ascending(positions, len(values), f"{name}.positions")
    values[positions] = np.frombuffer(values_data, _VALUE)
