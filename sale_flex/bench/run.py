# SPDX-License-Identifier: BSD-3-Clause
"""All settings of a benchmark, one after the other."""

from collections.abc import Iterator

import torch

from sale_flex._console.progress import Lines
from sale_flex.bench.inputs import Inputs
from sale_flex.bench.measure import Candidate, measure, measure_baselines, rows_without
from sale_flex.bench.plan import Plan
from sale_flex.bench.results import Results, Row, setting_key
from sale_flex.bench.table import describe, render


def run(plan: Plan, results: Results, fresh: bool, progress: Lines, silent: bool = False) -> list[list[Row]]:
    """Measure what `results` lacks (everything, if `fresh`), and return the rows of every setting.

    Args:
        plan: What to measure.
        results: Where rows are kept.
        fresh: Whether to measure again what is there.
        progress: Who is told.
        silent: Whether tables are left out, for where standard output is for JSON.
    """
    found = []
    for length in plan.lengths:
        # A second length would make the compiler switch to dynamic lengths, which run a little slower.
        if not plan.keep_compiled:
            torch.compiler.reset()
        for rows in _run_length(plan, length, results, fresh, progress):
            found.append(rows)
            progress.finish("" if silent else render(rows))
    return found


def _run_length(plan: Plan, length: int, results: Results, fresh: bool, progress: Lines) -> Iterator[list[Row]]:
    """The rows of one length's settings. Its tensors are made if they are needed, and gone when this ends."""
    inputs: Inputs | None = None
    dense: dict[str, Candidate] = {}
    for setting in plan.settings(length):
        progress.begin(describe(setting))
        rows = None if fresh else results.find(setting_key(setting))
        if rows is None:
            if inputs is None:
                progress.step("making the inputs")
                inputs = plan.source.load(length, plan.device)
                dense = measure_baselines(plan.baselines, inputs, progress.step)
            config, density = plan.configs[setting["config"]], setting["target_density"]
            try:
                measured = measure(inputs, config, density, dense, plan.rounds, progress.step)
            except torch.OutOfMemoryError as error:
                measured = rows_without(dense, str(error).partition("\n")[0])
            rows = [setting | row for row in measured]
            results.put(rows)
        yield rows
