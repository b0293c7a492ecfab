# SPDX-License-Identifier: BSD-3-Clause
"""`calibrate` and `evaluate`: a model over texts, one attention layer at a time."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sale_flex._console.stored import stored_config
from sale_flex.calibration.artefact import Calibration
from sale_flex.calibration.evaluation import Evaluation
from sale_flex.calibration.files import CONFIG
from sale_flex.calibration.goal import Goal
from sale_flex.calibration.model import prepared
from sale_flex.calibration.record import RECORD, TRANSFER_RECORD, Record, check_free, check_same
from sale_flex.calibration.texts import Tokens, as_texts
from sale_flex.calibration.weights import fingerprint
from sale_flex.calibration.work import Work
from sale_flex.call.break_even import break_even_length
from sale_flex.config import SaleConfig

if TYPE_CHECKING:
    from sale_flex._console.progress import Lines


def calibrate(
    model: Any,
    batches: Iterable[Any],
    *,
    config: SaleConfig = SaleConfig(),  # noqa: B008 - frozen
    target: float = 0.05,
    error: str = "relative",
    search: str = "bisection",
    out: str | Path | None = None,
    resume: bool = False,
    progress: "Lines | None" = None,
    transfer: Iterable[Any] | None = None,
) -> Calibration:
    """Find, for every layer and head, the largest threshold whose output stays near dense attention's on every text.

    The texts go through the model with dense attention, so that errors do not add up from layer to layer, and the
    search runs inside each layer's attention: no more than one layer's queries, keys and values are held. The error of
    one layer is no measure of quality; the result says what the loss comes to beside it.

    Args:
        model: A causal language model of transformers 5.17 or later. It is left as it was.
        batches: The texts: tensors ``[B, S]`` of token ids, or mappings with ``input_ids`` and ``attention_mask``, on
            any device. Each batch row is a text of its own.
        config: Rule, blocks and estimate; its threshold is not used.
        target: The largest error of a head.
        error: ``"relative"``: ``|o - o_dense|`` summed, as a share of ``|o_dense|`` summed. ``"absolute"``: summed over
            channels, averaged over tokens, as published (arXiv 2505.24179, section 3.3).
        search: ``"bisection"`` of steps from 2**-14 to 1, eight to an octave; or ``"halving"`` from 0.008 as published.
        out: Folder that gets the result, and after each layer what was found so far. It must hold no calibration,
            unless `resume` goes on with it.
        resume: Go on with what an interrupted call left in `out`, or return what a finished one did. Both must be of
            the same settings, texts and weights.
        progress: Who is told; by default a bar or lines on standard error.
        transfer: Texts of another kind, on which the result is evaluated too.

    Returns:
        The calibration, also written to `out`.

    Raises:
        TypeError, ValueError: An argument breaks its rule, or `resume` finds other settings, texts or weights, or files
            with something else in them; the message names it.
        NotImplementedError: The model runs tensor parallel, or its layers differ in heads.
        ModuleNotFoundError: transformers, or for `out` safetensors, is not installed.
    """
    goal = Goal(target, error, search)
    if not isinstance(config, SaleConfig):
        raise TypeError(f"config must be a sale_flex.SaleConfig, got {type(config).__name__}.")
    if resume and out is None:
        raise ValueError("resume needs the folder of the interrupted calibration: pass out too.")
    if out is not None:
        check_free(Path(out), resume)
        import safetensors.torch  # noqa: F401 - a missing package shows before the work, not behind it
    texts = as_texts(batches)
    others = None if transfer is None else as_texts(transfer, "transfer")
    folder = None if out is None else Path(out)
    config = replace(config, min_length=_resolved(config.min_length, model))
    with prepared(model) as layers:
        settings = _settings(model, layers, texts, config, goal)
        found = _finished(folder, settings) if resume and folder is not None else None
        own = there = None
        if found is None:
            own = Work(model, layers, texts, config, goal, Record(folder, RECORD, settings, len(texts), resume))
        if others is not None and (found is None or not _is_on(found.transfer, others)):
            moved = settings | {"transfer": _hashes(others)}
            record = Record(folder, TRANSFER_RECORD, moved, len(others), resume)
            there = Work(model, layers, others, config, goal, record)
        steps = (0 if own is None else own.steps(search=True)) + (0 if there is None else there.steps(search=False))
        with _meter(progress, steps) as meter:
            if own is not None:
                found = own.calibrate(settings, meter)
                _keep(found, folder, own.record)
            assert found is not None
            if there is not None:
                found = replace(found, transfer=there.evaluate(dict(zip(layers, found.thresholds)), meter))
                _keep(found, folder, there.record)
    return found


def evaluate(
    model: Any, calibration: Calibration, batches: Iterable[Any], *, progress: "Lines | None" = None
) -> Evaluation:
    """What a calibration's thresholds come to on texts: error and density of every head, and the loss beside dense.

    Args:
        model: The model, which is left as it was.
        calibration: The thresholds.
        batches: The texts, as `calibrate` takes them.
        progress: Who is told; by default a bar or lines on standard error.

    Raises:
        TypeError, ValueError: An argument breaks its rule, or the calibration is of a model of another shape.

    Warns:
        UserWarning: The calibration is of a model with other weights.
    """
    texts = as_texts(batches)
    thresholds = dict(zip(calibration.layers, calibration.thresholds))
    with prepared(model) as layers:
        calibration.check_fits(layers)
        calibration.check_weights(model)
        record = Record(None, RECORD, {}, len(texts), False)
        work = Work(model, layers, texts, calibration.config, calibration.goal, record)
        with _meter(progress, work.steps(search=False)) as meter:
            return work.evaluate(thresholds, meter)


def _resolved(min_length: int | None, model: Any) -> int:
    """`min_length` as it is on the model's device: what is stored must mean the same on every other."""
    if min_length is not None:
        return min_length
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return break_even_length(model.device, head_dim)


def _settings(
    model: Any, layers: Mapping[int, int], texts: Sequence[Tokens], config: SaleConfig, goal: Goal
) -> dict[str, Any]:
    """What a calibration's findings hold for, as JSON holds it."""
    import transformers

    import sale_flex

    return {
        "model": model.name_or_path or type(model).__name__,
        "revision": getattr(model.config, "_commit_hash", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "weights": fingerprint(model),
        "layers": list(layers),
        "heads": next(iter(layers.values())),
        "config": stored_config(config),
        "target": goal.target,
        "error": goal.error,
        "search": goal.search,
        "texts": _hashes(texts),
        "versions": {
            "sale_flex": sale_flex.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
    }


def _settings_of(calibration: Calibration) -> dict[str, Any]:
    """The settings of a finished calibration, as `_settings` has them."""
    stored = calibration.to_dict()
    names = (
        "model",
        "revision",
        "dtype",
        "device",
        "weights",
        "layers",
        "heads",
        "config",
        "target",
        "error",
        "search",
    )
    hashes = [text.sha256 for text in calibration.on.texts]
    return {name: stored[name] for name in names} | {"texts": hashes, "versions": stored["versions"]}


def _hashes(texts: Sequence[Tokens]) -> list[str]:
    return [text.sha256 for text in texts]


def _is_on(evaluation: Evaluation | None, texts: Sequence[Tokens]) -> bool:
    """Whether it is an evaluation on these texts."""
    return evaluation is not None and [text.sha256 for text in evaluation.texts] == _hashes(texts)


def _finished(folder: Path, settings: Mapping[str, Any]) -> Calibration | None:
    """The calibration in a folder, if it is done; ValueError if it is one of other settings."""
    if not (folder / CONFIG).exists() or (folder / RECORD).exists():
        return None
    calibration = Calibration.from_pretrained(folder)
    check_same(_settings_of(calibration), settings, folder)
    return calibration


def _keep(calibration: Calibration, folder: Path | None, record: Record) -> None:
    """Write the result, and then remove what it came from."""
    if folder is not None:
        calibration.save_pretrained(folder)
    record.remove()


def _meter(progress: "Lines | None", steps: int) -> "Lines":
    if progress is not None:
        return progress
    from sale_flex.calibration.meter import make_meter

    return make_meter(steps)
