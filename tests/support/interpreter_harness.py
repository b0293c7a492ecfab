# SPDX-License-Identifier: BSD-3-Clause
"""Triton's interpreter, where it would take a test's time: reductions by an operation of a kernel's own."""

from typing import Any

import numpy as np


def fold_slices(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """`ReduceOps.generic_reduce` of triton.runtime.interpreter, a slice of the axis at a time.

    The interpreter calls the operation for every single element, 30 microseconds each. Operations of reductions are
    elementwise, so that called with whole slices they combine the same elements in the same order.
    """
    axis = 0 if self.axis is None else self.axis
    arrays = [x.handle.data.reshape(-1) if self.axis is None else x.handle.data for x in inputs]
    shape = arrays[0].shape[:axis] + arrays[0].shape[axis + 1 :]

    def at(place: int) -> list[Any]:
        return [self.to_tensor(np.take(each, place, axis), x.dtype) for each, x in zip(arrays, inputs)]

    folded = at(0)
    for place in range(1, arrays[0].shape[axis]):
        combined = self.combine_fn.fn(*folded, *at(place))
        folded = list(combined) if isinstance(combined, tuple) else [combined]
    results = [x.handle.data.reshape(shape) for x in folded]
    if self.keep_dims:
        places = tuple(range(inputs[0].handle.data.ndim)) if self.axis is None else axis
        results = [np.expand_dims(each, places) for each in results]
    return [self.to_tensor(each, x.dtype) for each, x in zip(results, inputs)]
