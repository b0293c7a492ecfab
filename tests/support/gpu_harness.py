# SPDX-License-Identifier: BSD-3-Clause
"""What tests on a GPU share: inputs that a rule tells apart, and the check that it did."""

from torch import Tensor

from sale_flex import mods
from sale_flex.testing import Inputs, Shape, structured_inputs
from sale_flex.testing.programs import PROGRAMS

WIDE = 400
"""Keys of a window with room for blocks that are neither its edges nor the row's own."""


def _first_tokens(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return kv_idx < 4


# In windows of less than a few blocks nothing is left to choose.
SPARSE_PROGRAMS = PROGRAMS | {
    "window": lambda s, d: {"mask_mod": mods.sliding_window(WIDE, s.offset)},
    "window to both sides": lambda s, d: {
        "mask_mod": mods.sliding_window(WIDE, s.offset, causal=False),
        "is_causal": False,
    },
    "window and documents": lambda s, d: {
        "mask_mod": mods.and_masks(mods.sliding_window(WIDE, s.offset), PROGRAMS["documents"](s, d)["mask_mod"])
    },
    "window or sink": lambda s, d: {"mask_mod": mods.or_masks(mods.sliding_window(WIDE, s.offset), _first_tokens)},
    "neighborhood 1-d": lambda s, d: {"mask_mod": mods.neighborhood((s.kv_len,), WIDE + 1), "is_causal": False},
    "a block mask and a mask": lambda s, d: (
        PROGRAMS["a block mask"](s, d) | {"mask_mod": mods.sliding_window(2 * WIDE, s.offset), "is_causal": True}
    ),
}
"""The catalogue of programs, each with blocks to choose from."""


def selective_inputs(shape: Shape, seed: int) -> Inputs:
    """Inputs with passages so distinct that most blocks are clearly above or below a threshold, on the CPU."""
    return structured_inputs(shape, seed, topic=8.0)


def on_gpu(inputs: Inputs) -> Inputs:
    """The same on the GPU."""
    return Inputs(*(x.cuda() for x in inputs))


def assert_selective(density: Tensor | float) -> None:
    """Assert that a rule kept some blocks and left others, so that what is compared depends on its choice.

    Args:
        density: Kept over visible blocks, of one head or of several, of which the mean counts.
    """
    mean = float(density.float().mean()) if isinstance(density, Tensor) else density
    assert 0.1 < mean < 0.9, f"density {mean:.3f}: this input does not test a choice of blocks"
