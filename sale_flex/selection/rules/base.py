# SPDX-License-Identifier: BSD-3-Clause
"""What a selection rule is, and the registry of their names.

A rule says which blocks of the attention map matter. What a query can see, what is kept whatever the rule says, index
lists and attention are not its business.
"""

from dataclasses import dataclass, fields, replace
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from sale_flex.blocks.bits import pack_bits
from sale_flex.kernels.arguments import Structure

if TYPE_CHECKING:
    from sale_flex.call.facts import Call

BITS = (4, 8)
"""Widths that codes of queries and keys may have."""

GROUP = "sale_flex.rules"
"""Entry points of this group are rules of other packages: name -> class."""


class Selection(NamedTuple):
    """What a rule chose."""

    hits: Tensor
    """int32 ``[B, Hq, nq, ceil(nk / 32)]``: bits of the blocks; of hidden and always-kept ones they mean nothing."""
    dropped: Tensor | None = None
    """int32 ``[B, Hq, nq]``: hits given up for want of room in index lists; None from a rule that gives up none."""


@dataclass(frozen=True, eq=False)
class Rule:
    """A selection rule: frozen options, and how they choose. A subclass is a frozen dataclass with ``eq=False``.

    The least that a rule of one's own needs is a `name` and `scores`: a block is kept when its score reaches the
    threshold. `examples/antidiagonal_rule.py` is one. A rule that is faster than that overrides `select`.
    """

    threshold: float | Tensor
    """What a block must reach, 0 or more: a float for all heads, or a float tensor ``[Hq]`` on the query's device.
    Higher keeps less; 0 makes a head dense."""

    name: ClassVar[str]
    """In saved configs and on the command line."""
    threshold_range: ClassVar[tuple[float, float]] = (1e-8, 1.0)
    """Where a threshold that gives a density is searched for."""
    gives_up: ClassVar[bool] = False
    """Whether it can choose what to give up where index lists have no room for all hits (`Call.room`)."""

    def __post_init__(self) -> None:
        check_threshold(self.threshold)

    def check_blocks(self, block_size: tuple[int, int]) -> None:
        """Raise ValueError if the rule can not choose among blocks of (query rows, keys)."""

    @property
    def max_blocks(self) -> int | None:
        """Room in a query block's index list that was asked for, in blocks; None: what there is."""
        return None

    def codes(self, call: "Call") -> tuple[Any, ...]:
        """What it wants to know of the keys; `select` gets it. It alone may use `Call.reuse`."""
        return ()

    def select(self, call: "Call", codes: tuple[Any, ...], structure: Structure | None) -> Selection:
        """Which blocks are hit.

        Args:
            call: The call.
            codes: From `codes`.
            structure: Which blocks are visible under the call's mods, and which are candidates; None in plain causal
                attention.
        """
        return Selection(pack_bits(self.scores(call, structure) >= call.threshold[:, None, None]))

    def scores(self, call: "Call", structure: Structure | None = None) -> Tensor:
        """The largest threshold at which every block is hit, float32 ``[B, Hq, nq, nk]``: calibration compares them.

        Those of hidden and of always-kept blocks mean nothing. A rule may answer on a ladder of thresholds
        (`sale_flex.selection.rules.ladder`); its answers have to be exact there.
        """
        raise NotImplementedError(f"{type(self).__name__} has no scores; define them, or `select`.")

    def describe(self) -> str:
        """In a word or two, for a summary."""
        return self.name

    def remark(self, call: "Call") -> str:
        """What it does in this call otherwise than its options say, for `SaleStats.reason`; nothing for most."""
        return ""

    def options(self) -> dict[str, Any]:
        """All fields but the threshold, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "threshold"}

    def with_threshold(self, threshold: float | Tensor) -> Self:
        """The same rule at another threshold."""
        return replace(self, threshold=threshold)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and same_fields(self, other)

    def __hash__(self) -> int:
        return hash((self.name, *(repr(value) for value in self.options().values())))


AnyRule = TypeVar("AnyRule", bound=type[Rule])

_RULES: dict[str, type[Rule]] = {}


def register_rule(rule: AnyRule) -> AnyRule:
    """Make a rule known by its `name`, to saved configs and on the command line. Serves as a decorator.

    A package can also name its rules as entry points of the group ``sale_flex.rules``; those are loaded when they are
    asked for. `SaleConfig(rule=...)` takes rules that are not registered.

    Raises:
        TypeError: It is no `Rule`, or has no name.
        ValueError: Another rule has the name.
    """
    if not (isinstance(rule, type) and issubclass(rule, Rule)):
        raise TypeError(f"rule must be a subclass of sale_flex.Rule, got {rule!r}.")
    name = getattr(rule, "name", None)
    if not isinstance(name, str) or not name:
        raise TypeError(f"{rule.__name__}.name must be a string, what saved configs call the rule, got {name!r}.")
    known = _RULES.setdefault(name, rule)
    # A module that is loaded again defines the same class anew.
    if (known.__module__, known.__qualname__) != (rule.__module__, rule.__qualname__):
        raise ValueError(f"{rule.__name__}.name must be of no other rule, got {name!r}, which is {known.__name__}'s.")
    _RULES[name] = rule
    return rule


def rule_names() -> tuple[str, ...]:
    """Names of the rules there are."""
    return tuple(dict.fromkeys([*_RULES, *(entry.name for entry in entry_points(group=GROUP))]))


def rule_named(name: str) -> type[Rule]:
    """The rule of a name.

    Raises:
        ValueError: There is none.
    """
    if name not in _RULES:
        for entry in entry_points(group=GROUP):
            if entry.name == name:
                register_rule(entry.load())
    if name not in _RULES:
        raise ValueError(
            f"rule must be one of {rule_names()}, got {name!r}; a rule of another package is known once it is "
            "imported and registered (sale_flex.register_rule)."
        )
    return _RULES[name]


def check_threshold(threshold: float | Tensor) -> None:
    """Raise TypeError or ValueError unless it is 0 or more and finite, or a float tensor ``[Hq]`` of such."""
    if isinstance(threshold, Tensor):
        if threshold.dim() != 1 or not threshold.is_floating_point():
            raise ValueError(
                "threshold must be a float or a floating-point tensor of shape [Hq], got a tensor of shape "
                f"{list(threshold.shape)} and dtype {threshold.dtype}."
            )
        # Values on an accelerator are not read here: that would stop the host. They are checked where they are used.
        if threshold.device.type == "cpu" and not bool((threshold >= 0).all() & threshold.isfinite().all()):
            raise ValueError(f"threshold must be 0 or more and finite for every head, got {threshold.tolist()}.")
        return
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"threshold must be a float or a float tensor of shape [Hq], got {type(threshold).__name__}.")
    if not 0 <= threshold < float("inf"):
        raise ValueError(f"threshold must be 0 or more and finite, got {threshold!r}.")


def check_one_of(name: str, value: object, options: tuple[Any, ...], unit: str = "") -> None:
    """Raise ValueError unless a field's value is one of some, of their type."""
    if not any(type(value) is type(option) and value == option for option in options):
        raise ValueError(f"{name} must be one of {options}{unit and ' ' + unit}, got {value!r}.")


def check_count(name: str, value: object, least: int, unit: str) -> None:
    """Raise TypeError or ValueError unless a field's value is an int of `least` or more."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int (a number of {unit}), got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least} {unit}, got {value}.")


def same_fields(one: Any, other: Any) -> bool:
    """Whether two of the same dataclass have equal fields; of tensors, equal values."""
    for field in fields(one):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, Tensor) or isinstance(theirs, Tensor):
            if not (isinstance(mine, Tensor) and isinstance(theirs, Tensor) and torch.equal(mine, theirs)):
                return False
        elif mine != theirs:
            return False
    return True
