"""Columns of numbers as bytes, in the forms that `Column` in v1/schedule.proto explains.

Packing chooses the cheapest form: one constant; a base and narrow deltas (0 is kept apart); the
same with outliers as exceptions. Unpacking checks every length and range.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from tablewire.errors import CodecError
from tablewire.model.columns import U64

EXCEPTION_BYTES: Final = 12
"""The cost of one exception: its position (4) and its value (8)."""
MIN_ROWS_TO_SEARCH: Final = 16
"""A shorter column is packed in the plain form, without a search for a cheaper one."""

_U64_MAX: Final = 2**64 - 1
_SIGN: Final = np.uint64(1 << 63)
_POSITION: Final = np.dtype("<u4")
_VALUE: Final = np.dtype("<u8")
_DELTAS: Final = {width: np.dtype(f"<u{width}") for width in (1, 2, 4, 8)}

_Scalar = TypeVar("_Scalar", bound=np.generic)


def pack(column: Any, values: npt.NDArray[Any], path: str, dtype: type[np.generic], rows: int) -> None:
    """Fill a pb Column; raise CodecError unless `values` are `rows` elements of `dtype`."""
    check_array(values, path, dtype, rows)
    if rows and dtype is np.int64:
        _pack_u64(column, values.view(np.uint64) ^ _SIGN)
    elif rows:
        _pack_u64(column, values.astype(np.uint64, copy=False))


def check_array(values: npt.NDArray[Any], path: str, dtype: type[np.generic], rows: int) -> None:
    """Raise CodecError if a column that is to be sent has the wrong type or length."""
    if not isinstance(values, np.ndarray) or values.dtype != np.dtype(dtype):
        found = getattr(values, "dtype", type(values).__name__)
        raise CodecError(f"{path}: a column of {np.dtype(dtype)} is wanted, not {found}")
    if values.shape != (rows,):
        raise CodecError(f"{path}: shape {values.shape}, wanted ({rows},)")


def unpack(column: Any, path: str, dtype: type[_Scalar], rows: int) -> npt.NDArray[_Scalar]:
    """Return the elements, read-only; raise CodecError unless they are `rows` valid ones of `dtype`."""
    if not rows and (column.base or column.width or column.deltas or column.positions or column.values):
        raise CodecError(f"{path}: a column of 0 elements holds data")
    values: npt.NDArray[Any] = _unpack_u64(column, path, rows) if rows else np.empty(0, np.uint64)
    if dtype is np.int64:
        values = (values ^ _SIGN).view(np.int64)
    elif rows and dtype is not np.uint64 and (largest := int(values.max())) > np.iinfo(dtype).max:  # type: ignore[type-var]
        raise CodecError(f"{path}: {largest} does not fit {np.dtype(dtype)}")
    values = values.astype(dtype, copy=False)
    values.flags.writeable = False
    return values


def require_ascending(positions: npt.NDArray[Any], limit: int, path: str) -> None:
    """Raise CodecError unless the positions are strictly ascending and below `limit`."""
    if not bool((positions[1:] > positions[:-1]).all()):
        raise CodecError(f"{path}: positions are not strictly ascending")
    if len(positions) and int(positions[-1]) >= limit:
        raise CodecError(f"{path}: position {int(positions[-1])} is outside of {limit} rows")


# ---------------------------------------------------------------------------------------------------------------------
# Packing


def _pack_u64(column: Any, values: U64) -> None:
    lowest, highest = int(values.min()), int(values.max())
    if lowest == highest:
        column.base = lowest
        return
    # 0 wraps around to the maximum here: this is the lowest element except 0, minus one, so that
    # its delta is 1.
    base = lowest - 1 if lowest else int((values - np.uint64(1)).min())
    width = _width(highest - base)
    if len(values) >= MIN_ROWS_TO_SEARCH:
        width, base, outliers = _cheapest(values, lowest, highest, base, width)
    else:
        outliers = None
    column.base = base
    column.width = width
    if width:
        deltas = values - np.uint64(base)
        if lowest == 0:
            deltas[values == 0] = 0
        if outliers is not None:
            deltas[outliers] = 0
        column.deltas = deltas.astype(_DELTAS[width]).tobytes()
    if outliers is not None:
        positions = np.flatnonzero(outliers)
        column.positions = positions.astype(_POSITION).tobytes()
        column.values = values[positions].astype(_VALUE).tobytes()


def _width(largest_delta: int) -> int:
    return next(width for width in (1, 2, 4, 8) if largest_delta < 1 << (8 * width))


def _cheapest(values: U64, lowest: int, highest: int, base: int, width: int) -> tuple[int, int, npt.NDArray[np.bool_] | None]:
    """Return (width, base, exceptions) of the plain form, or of a cheaper narrower one.

    A narrower form is anchored at the low or the high end. It has at least the exceptions of a
    wider one with the same anchor, so the search ends at the first width whose exceptions alone
    cost more than the best form.
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
            candidate_base, outliers = candidate
            exceptions_cost = int(np.count_nonzero(outliers)) * EXCEPTION_BYTES
            if exceptions_cost >= best_cost:
                open_anchors[anchor] = False
            elif exceptions_cost + len(values) * narrower < best_cost:
                best_cost = exceptions_cost + len(values) * narrower
                best = (narrower, candidate_base, outliers)
        if not any(open_anchors):
            break
    return best


def _anchored(
    values: U64, width: int, lowest: int, highest: int, base: int
) -> tuple[tuple[int, npt.NDArray[np.bool_]], tuple[int, npt.NDArray[np.bool_]]]:
    """Return (base, exceptions) of one width, anchored at the low end and at the high end."""
    if width == 0:
        return (lowest, values != np.uint64(lowest)), (highest, values != np.uint64(highest))
    reach = (1 << (8 * width)) - 1
    # The width is narrower than the plain form's: reach < highest - base, so neither sum nor
    # difference overflows.
    low = values > np.uint64(base + reach)
    high = values <= np.uint64(highest - reach)
    if lowest == 0:
        high &= values != 0
    return (base, low), (highest - reach, high)


# ---------------------------------------------------------------------------------------------------------------------
# Unpacking


def _unpack_u64(column: Any, path: str, rows: int) -> U64:
    width, base, data = column.width, column.base, column.deltas
    if width != 0 and width not in _DELTAS:
        raise CodecError(f"{path}.width: {width} is not one of 0, 1, 2, 4, 8")
    if len(data) != rows * width:
        raise CodecError(f"{path}.deltas: {len(data)} bytes, wanted {rows} x {width}")
    if width == 0:
        values = np.full(rows, base, np.uint64)
    else:
        deltas = np.frombuffer(data, _DELTAS[width])
        values = deltas.astype(np.uint64)
        if base:
            if base + int(deltas.max()) > _U64_MAX:
                raise CodecError(f"{path}: base + delta exceeds 64 bits")
            values += np.uint64(base)
            if int(deltas.min()) == 0:
                values[deltas == 0] = 0
    if column.positions or column.values:
        _put_exceptions(values, column.positions, column.values, path)
    return values


def _put_exceptions(values: U64, positions_data: bytes, values_data: bytes, path: str) -> None:
    count, rest = divmod(len(positions_data), _POSITION.itemsize)
    if rest:
        raise CodecError(f"{path}.positions: {len(positions_data)} bytes is not a multiple of {_POSITION.itemsize}")
    if len(values_data) != count * _VALUE.itemsize:
        raise CodecError(f"{path}.values: {len(values_data)} bytes, wanted {count} x {_VALUE.itemsize}")
    positions = np.frombuffer(positions_data, _POSITION)
    require_ascending(positions, len(values), f"{path}.positions")
    values[positions] = np.frombuffer(values_data, _VALUE)
