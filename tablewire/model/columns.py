"""The array types of columns, and their comparison."""

from __future__ import annotations

from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

U8: TypeAlias = npt.NDArray[np.uint8]
U32: TypeAlias = npt.NDArray[np.uint32]
U64: TypeAlias = npt.NDArray[np.uint64]
I64: TypeAlias = npt.NDArray[np.int64]
F64: TypeAlias = npt.NDArray[np.float64]

_Columns = TypeVar("_Columns")


def same_columns(left: _Columns, right: _Columns) -> bool:
    """Equality by value of two dataclasses of one type that hold numpy columns."""
    for name in left.__dataclass_fields__:  # type: ignore[attr-defined]
        mine, theirs = getattr(left, name), getattr(right, name)
        if isinstance(mine, np.ndarray) or isinstance(theirs, np.ndarray):
            if not np.array_equal(mine, theirs):
                return False
        elif mine != theirs:
            return False
    return True
