# SPDX-License-Identifier: BSD-3-Clause
"""An evaluation in Markdown."""

from collections.abc import Mapping, Sequence

from sale_flex.eval.run import Outcome

COLUMNS = ("tokens", "rule", "density", "rise in loss, 95 %", "largest", "miss", "prefill", "to dense")


def markdown(found: Sequence[Outcome], provenance: Mapping[str, object]) -> str:
    """A line per length and rule, the rise in mean loss beside dense attention on the same tokens."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(cells, found)]
    where = ", ".join(f"{name} {provenance[name]}" for name in ("device", "torch", "triton", "transformers", "commit"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{where}\n"


def cells(one: Outcome) -> tuple[str, ...]:
    """A line's cells."""
    return (
        str(one.tokens),
        one.rule,
        "" if one.density is None else f"{one.density:.3f}",
        str(one.rise),
        f"{one.largest:+.4f}",
        "" if one.miss is None else f"{one.miss:.2f}",
        f"{one.seconds:.3g} s",
        f"{one.speedup:.2f}x",
    )
