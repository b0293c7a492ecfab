# SPDX-License-Identifier: BSD-3-Clause
"""One setting: find the threshold, check the outputs, then measure memory and time."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sale_flex.attention import AuxRequest
from sale_flex.bench.baselines import baseline
from sale_flex.bench.check import Errors, errors, sampled_rows
from sale_flex.bench.inputs import Inputs
from sale_flex.bench.results import Row
from sale_flex.bench.stages import ORDER, WHOLE, Stages, whole_call
from sale_flex.bench.threshold import Kept, count_kept, find_threshold
from sale_flex.bench.timing import interleave, peak_bytes
from sale_flex.config import SaleConfig
from sale_flex.stats import Path

Step = Callable[[str], None]
"""Is told what is about to be done."""


@dataclass
class Candidate:
    """One row of a setting's table, but for its times."""

    run: Callable[[], Any] | None = None
    """None if it does not run."""
    not_run: str | None = None
    """Why it does not."""
    extra_bytes: int | None = None
    """Peak memory beyond what is there before and beyond the output."""
    errors: Errors | None = None
    """Of its output on sampled rows; None for a stage without one."""


@torch.inference_mode()
def measure_baselines(names: Sequence[str], inputs: Inputs, step: Step) -> dict[str, Candidate]:
    """Run dense attention once per name: what it needs, how good it is, and why it does not run where it does not."""
    found = {}
    rows = sampled_rows(inputs.query.shape[2], inputs.query.device)
    for name in names:
        step(f"dense {name}")
        try:
            run = baseline(name, inputs)
            output, extra = peak_bytes(run, inputs.query.device)
        except RuntimeError as error:  # what SDPA and the compiler raise, also for want of memory
            found[f"dense {name}"] = Candidate(not_run=str(error).partition("\n")[0])
            continue
        sampled = output[:, :, rows]
        del output
        found[f"dense {name}"] = Candidate(run, None, extra, errors(sampled, inputs, rows, None))
    return found


@torch.inference_mode()
def measure(
    inputs: Inputs, config: SaleConfig, density: float | None, dense: Mapping[str, Candidate], rounds: int, step: Step
) -> list[Row]:
    """The rows of one setting: dense attention, the stages, and the whole call.

    Args:
        inputs: The call's tensors.
        config: What to measure.
        density: If given, the threshold is searched that keeps this share of the visible blocks.
        dense: What `measure_baselines` found on the same inputs.
        rounds: How often everything is timed, at most.
        step: Is told what is being done.

    Raises:
        WrongOutput: An output is wrong; nothing has been timed.
    """
    step("first call")
    ran = whole_call(inputs, config)(return_aux=AuxRequest(stats=True))[1].stats
    sparse, path = ran.path is not Path.DENSE_SDPA, ran.describe()
    if sparse and density is not None:
        step("searching the threshold")
        config = find_threshold(inputs, config, density)
    kept = count_kept(inputs, config) if sparse else Kept(1.0, 0)
    step("checking the outputs")
    ours = _checked(inputs, config, sparse, path)
    step("measuring memory")
    for candidate in ours.values():
        if candidate.run is not None:
            candidate.extra_bytes = peak_bytes(candidate.run, inputs.query.device)[1]
    candidates = {**dense, **ours}
    runs = {name: candidate.run for name, candidate in candidates.items() if candidate.run is not None}
    times = interleave(runs, rounds, inputs.query.device, step)
    common = {"threshold": config.rule.threshold, **kept._asdict(), "path": path}
    return _rows(candidates, times, common, inputs.query.nbytes)


def _checked(inputs: Inputs, config: SaleConfig, sparse: bool, path: str) -> dict[str, Candidate]:
    """Our candidates, after the outputs of the whole call and of its last stage have been found right."""
    rows = sampled_rows(inputs.query.shape[2], inputs.query.device)
    output = whole_call(inputs, config)()[:, :, rows]  # sampled before the mask is built: memory
    if not sparse:
        found = {name: Candidate(not_run=f"the call ran {path}") for name in ORDER}
        found[WHOLE] = Candidate(whole_call(inputs, config), errors=errors(output, inputs, rows, None).check(WHOLE))
        return found
    stages = Stages(inputs, config)
    runs = stages.runs()
    found = {name: Candidate(runs.get(name), None if name in runs else "no row is early") for name in ORDER}
    stages.build_mask()
    mask, late = stages.mask, rows[rows >= stages.early]
    found["flex"].errors = errors(stages.attend()[:, :, late], inputs, late, mask).check("flex")
    found[WHOLE].errors = errors(output, inputs, rows, mask, stages.early).check(WHOLE)
    return found


def rows_without(dense: Mapping[str, Candidate], reason: str) -> list[Row]:
    """The rows of a setting that could not be measured."""
    candidates = {name: Candidate(not_run=reason) for name in (*dense, *ORDER)}
    return _rows(candidates, {}, {"threshold": None, "density": None, "dropped": None, "path": None}, 1)


def _rows(
    candidates: Mapping[str, Candidate], times: Mapping[str, list[float]], common: Row, query_bytes: int
) -> list[Row]:
    """Rows of JSON. Times in milliseconds, ratios to the medians of the dense candidates, memory in bytes."""
    medians = {name: statistics.median(series) for name, series in times.items()}
    dense = {name.removeprefix("dense "): medians.get(name) for name in candidates if name.startswith("dense ")}
    rows = []
    for name, candidate in candidates.items():
        extra, error = candidate.extra_bytes, candidate.errors
        row: Row = {
            "name": name,
            "not_run": candidate.not_run,
            "ms": medians.get(name),
            "ms_all": times.get(name),
            "extra_bytes": extra,
            "extra_over_query": None if extra is None else extra / query_bytes,
            "error": None if error is None else error.kept,
            "error_usual": None if error is None else error.usual,
            "error_to_dense": None if error is None else error.dense,
        }
        for short, base in dense.items():
            row[f"over_{short}"] = medians[name] / base if base is not None and name in medians else None
        rows.append(row | common)
    return rows
