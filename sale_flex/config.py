# SPDX-License-Identifier: BSD-3-Clause
"""`SaleConfig`: the rule, and the options that every rule has in common, with units and ranges."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from torch import Tensor

from sale_flex.selection.rules import Mass, Rule, rule_named
from sale_flex.selection.rules.base import check_count, same_fields

BLOCK_SIZES = ((64, 64), (64, 32), (128, 64), (128, 128))
ON_MISS = ("report", "dense", "ignore")


@dataclass(frozen=True, eq=False)
class SaleConfig:
    """What a call keeps: the rule that chooses blocks, and what every rule has in common. Frozen.

    `dataclasses.replace` makes a changed copy, `with_threshold` one at another threshold.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field is outside its range. The message names the field, the rule and the value.
    """

    # A function, because torch.compile traces into no class that is a factory.
    rule: Rule = field(default_factory=lambda: Mass())
    """What chooses blocks, with its threshold: `sale_flex.Mass`, `sale_flex.Relative`, or one of your own."""

    block_size: tuple[int, int] = (64, 64)
    """(query rows, keys) of a block: (64, 64), (64, 32), (128, 64) or (128, 128)."""

    sink_tokens: int = 32
    """How many of the first valid keys count as attention sinks, in tokens, 0 or more. Their blocks are always kept.
    Under a mask, of the first keys that a row sees: a document's own, or a window's."""

    local_tokens: int = 128
    """How many keys, ending at a row's own position, count as local, in tokens, 1 or more. Always kept. Without
    causality as many on either side."""

    min_length: int | None = None
    """Queries fewer than this many keys after the first valid key keep every block, in tokens, 0 or more. A prompt
    that is shorter as a whole is dense, and so are documents and windows that are shorter. None: where the sparse path
    breaks even on the device (`break_even_length`)."""

    smooth_tokens: int = 1024
    """The mean of this many first valid keys is subtracted from all keys before quantisation, in tokens, 0 or more
    (0: no smoothing). A prefix, so that chunks, padding and batches choose the same blocks."""

    on_miss: str = "report"
    """What the audit is for: one row of every 64 to 256 positions is scored exactly, to see what the choice missed
    (`sale_flex.stats.Audit`). ``"report"``: for the stats of who asks for them, and the transformers integration does.
    ``"dense"``: in every call, and a head that missed more than `miss_bound` keeps all its blocks, decided on the
    device; index lists then have room for all. ``"ignore"``: no audit."""

    miss_bound: float = 0.2
    """Share of what audited rows want, in [0, 1], whose loss is too much (`sale_flex.stats.Audit.miss`)."""

    @classmethod
    def from_options(cls, rule: str = Mass.name, **options: Any) -> Self:
        """From flat options, as command lines and configuration files have them.

        Args:
            rule: A rule's name: ``"mass"``, ``"relative"``, or one that was registered.
            options: Fields of the rule and of `SaleConfig`, by name; what is left out is the default.

        Raises:
            TypeError, ValueError: There is no such rule or option, or a value is outside its range.
        """
        kind: Callable[[], Rule] = rule_named(rule)  # every option of a registered rule has a default
        return cls(rule=kind()).with_options(**options)

    def with_options(self, **options: Any) -> Self:
        """A copy with other values of some fields, of the rule or of its own, by name.

        Raises:
            TypeError, ValueError: There is no such option, or a value is outside its range.
        """
        of_rule = {field.name for field in fields(self.rule)}
        own = {field.name for field in fields(self)} - {"rule"}
        for name in options:
            if name not in of_rule | own:
                raise ValueError(
                    f"options must be fields of rule {self.rule.name!r}, {', '.join(sorted(of_rule))}, or of "
                    f"SaleConfig, {', '.join(sorted(own))}, got {name!r}."
                )
        rule = replace(self.rule, **{name: value for name, value in options.items() if name in of_rule})
        return replace(self, rule=rule, **{name: value for name, value in options.items() if name in own})

    def with_threshold(self, threshold: float | Tensor) -> Self:
        """The same at another threshold of the rule."""
        return replace(self, rule=self.rule.with_threshold(threshold))

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rule):
            raise TypeError(
                f"rule must be a sale_flex.Rule, such as sale_flex.Mass(threshold=0.01), got {self.rule!r}."
            )
        if self.on_miss not in ON_MISS:
            raise ValueError(f"on_miss must be one of {ON_MISS}, got {self.on_miss!r}.")
        if isinstance(self.miss_bound, bool) or not isinstance(self.miss_bound, (int, float)):
            raise TypeError(f"miss_bound must be a float, got {self.miss_bound!r}.")
        if not 0 <= self.miss_bound <= 1:
            raise ValueError(f"miss_bound must be a share in [0, 1], got {self.miss_bound!r}.")
        if tuple(self.block_size) not in BLOCK_SIZES:
            raise ValueError(
                f"block_size must be (query rows, keys), one of {list(BLOCK_SIZES)}, got {self.block_size!r}."
            )
        object.__setattr__(self, "block_size", tuple(self.block_size))
        check_count("sink_tokens", self.sink_tokens, 0, "tokens")
        check_count("local_tokens", self.local_tokens, 1, "tokens")
        check_count("smooth_tokens", self.smooth_tokens, 0, "tokens")
        if self.min_length is not None:
            check_count("min_length", self.min_length, 0, "tokens")
        self.rule.check_blocks(self.block_size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SaleConfig) and same_fields(self, other)

    def __hash__(self) -> int:
        return hash((self.rule, self.block_size, self.sink_tokens, self.local_tokens, self.min_length))
