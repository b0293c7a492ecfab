# SPDX-License-Identifier: BSD-3-Clause
"""What the two files of a calibration say, read with a rule for every field."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sale_flex._console.stored import (
    Broken,
    above_zero,
    anything,
    by_name,
    check,
    each,
    integer,
    number,
    one_of,
    optional,
    record,
    sale_config,
    shown,
    text,
)
from sale_flex.calibration.evaluation import Evaluation, Text
from sale_flex.calibration.files import CONFIG, FORMAT, TENSORS, read_object
from sale_flex.calibration.goal import ERRORS, SEARCHES, Goal


def read_fields(folder: Path) -> dict[str, Any]:
    """The fields of a `sale_flex.Calibration`, from its folder.

    Raises:
        FileNotFoundError: A file is missing.
        ModuleNotFoundError: safetensors is not installed.
        ValueError: A file is of another format, or a field breaks its rule; the message names both.
    """
    stored = read_object(folder / CONFIG, "calibration")
    if stored.get("format") != FORMAT:
        raise ValueError(
            f"{folder / CONFIG} must be of format {FORMAT}, got {shown(stored.get('format'))}; "
            "take the version of sale_flex that wrote it, or calibrate again."
        )
    file = f"{folder / CONFIG} is of a damaged or incomplete calibration"
    fields = check({"weights": None} | stored, _STORED, file, "mend the field or calibrate again.")
    kinds = {"on": ""} | ({"transfer": "transfer_"} if fields["transfer"] else {})
    names = ["thresholds", *(f"{kind}{name}" for kind in kinds.values() for name in ("errors", "densities"))]
    tensors = _read_tensors(folder / TENSORS, names, (len(fields["layers"]), fields.pop("heads")))
    unknown = set(fields["unused"]) - set(fields["layers"])
    if unknown:
        raise ValueError(f"{file}: unused must be among the layers, got {sorted(unknown)}; calibrate again.")
    for name, kind in kinds.items():
        fields[name] = Evaluation(tensors[f"{kind}errors"], tensors[f"{kind}densities"], fields[name])
    goal = Goal(*(fields.pop(name) for name in ("target", "error", "search")))
    return fields | {"thresholds": tensors["thresholds"], "goal": goal}


def _read_tensors(path: Path, names: Sequence[str], shape: tuple[int, int]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is no calibration: it has no {path.name}; calibrate again.")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}; calibrate again.") from None
    missing = [repr(name) for name in names if name not in tensors]
    for name in names:
        if name not in tensors:
            raise ValueError(f"{path} is of an incomplete calibration: {', '.join(missing)} missing; calibrate again.")
        if tensors[name].shape != shape or tensors[name].dtype != torch.float32:
            raise ValueError(
                f"{path} must hold {name} as float32 {list(shape)}, as layers and heads of {CONFIG} say, got "
                f"{tensors[name].dtype} {list(tensors[name].shape)}; calibrate again."
            )
    thresholds = tensors["thresholds"]
    if not bool((thresholds >= 0).all() & thresholds.isfinite().all()):
        raise ValueError(
            f"{path}: thresholds must be 0 or more and finite, got {thresholds.tolist()}; calibrate again."
        )
    return tensors


def _text(value: Any, field: str) -> Text:
    rules = {"sha256": text, "shape": each(integer(1), 2), "targets": integer(1)}
    found = record(rules | dict.fromkeys(("loss_dense", "loss_sparse"), number()))(value, field)
    return Text(**found | {"shape": tuple(found["shape"])})


def _texts(value: Any, field: str) -> tuple[Text, ...]:
    """The texts of what `Evaluation.to_dict` returned; all else follows from them and the tensors."""
    return tuple(record({"texts": each(_text, least=1)})(value, field)["texts"])


def _indices(value: Any, field: str) -> tuple[int, ...]:
    """Layers."""
    layers = each(integer(0))(value, field)
    if layers != sorted(set(layers)):
        raise Broken(f"{field} must ascend, each layer once, got {shown(value)}")
    return tuple(layers)


def _layers(value: Any, field: str) -> tuple[int, ...]:
    return _indices(each(anything, least=1)(value, field), field)


_STORED = record(
    {
        **dict.fromkeys(("model", "dtype", "device"), text),
        "revision": optional(text),
        "weights": optional(by_name(by_name(text))),
        "layers": _layers,
        "heads": integer(1),
        "config": sale_config(threshold=False, partial=False),
        "target": number("a number above 0", above_zero),
        "error": one_of(ERRORS),
        "search": one_of(SEARCHES),
        "unused": _indices,
        "on": _texts,
        "transfer": optional(_texts),
        "versions": by_name(text),
    }
)
"""The content of ``config.json``, as far as it is read."""
