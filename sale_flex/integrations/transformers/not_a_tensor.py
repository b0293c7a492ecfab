# SPDX-License-Identifier: BSD-3-Clause
"""A mask without elements says so to whoever takes it for a tensor: a layer that combines masks by hand."""

from collections.abc import Callable
from typing import Any, NoReturn

from torch.nn.attention.flex_attention import BlockMask

from sale_flex.integrations.transformers.refused import NAME

_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
_OPERATORS = (
    *(f"__{side}{name}__" for name in _BINARY for side in ("", "r", "i")),
    *(f"__{name}__" for name in ("lt", "le", "gt", "ge", "neg", "pos", "abs", "invert", "float", "int", "index")),
    *(f"__{name}__" for name in ("iter", "getitem", "setitem", "array")),
)


def sentence(what: str) -> str:
    """What is wrong with the use of a mask as a tensor."""
    return (
        f"A mask made for attn_implementation={NAME!r} has no elements, but the model uses it as a tensor ({what}): it "
        "combines masks by hand, which sale_flex can not follow. Use attn_implementation='sdpa' or 'eager' for this "
        "model; for flex_attention make a mask with sale_flex.create_sale_block_mask."
    )


class NotATensor(BlockMask):
    """A BlockMask whose elements nobody can ask for."""

    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> NoReturn:
        # An AttributeError, so that hasattr and copy go on working.
        raise AttributeError(sentence(f".{name}"))

    def __eq__(self, other: object) -> bool:
        if other is None or isinstance(other, BlockMask):
            return self is other
        raise TypeError(sentence("=="))

    def __ne__(self, other: object) -> bool:
        return not self == other

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise TypeError(sentence(getattr(func, "__name__", str(func))))

    def to_dense(self) -> NoReturn:
        """Raise TypeError."""
        raise TypeError(sentence("to_dense"))


def _refusing(name: str) -> Callable[..., NoReturn]:
    def refused(self: NotATensor, *args: Any) -> NoReturn:
        raise TypeError(sentence(name))

    return refused


for _name in _OPERATORS:
    setattr(NotATensor, _name, _refusing(_name))
