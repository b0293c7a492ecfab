# SPDX-License-Identifier: BSD-3-Clause
"""`Calibration`: thresholds of every layer and head, how they came about, and the two files that hold them."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from sale_flex._console.stored import stored_config
from sale_flex.calibration.evaluation import Evaluation
from sale_flex.calibration.files import CONFIG, FORMAT, TENSORS, write_json
from sale_flex.calibration.goal import Goal
from sale_flex.calibration.reader import read_fields
from sale_flex.calibration.weights import Weights, differing, fingerprint
from sale_flex.call.facts import EVERY_ROW
from sale_flex.config import SaleConfig


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """Thresholds per layer and head. `str()` is a summary.

    Raises:
        ValueError: A tensor's shape does not fit the layers.
    """

    config: SaleConfig
    """What was calibrated: rule, blocks, estimate. Its threshold means nothing."""
    thresholds: Tensor
    """float32 ``[layers, heads]``, on the CPU; 0 is a dense head."""
    layers: tuple[int, ...]
    """The ``layer_idx`` of every row, ascending; models with layers of other attention have gaps."""
    goal: Goal
    """The error allowed, and the search."""
    on: Evaluation
    """What the thresholds come to on the texts of the calibration."""
    model: str
    """Name or folder of the model."""
    revision: str | None = None
    """Its commit on the hub, if it is from there."""
    dtype: str = "float32"
    """Of its weights in the calibration."""
    device: str = "cpu"
    """Type of the device of the calibration."""
    unused: tuple[int, ...] = ()
    """Layers in which no text left a choice, because all it saw there is kept in any case (``min_length``, a narrow
    window): they are dense."""
    transfer: Evaluation | None = None
    """What the thresholds come to on texts of another kind."""
    versions: Mapping[str, str] | None = None
    """Package -> version, in the calibration."""
    weights: Weights | None = None
    """Hashes of the model's weights by part and dtype; None where they could not be had
    (`sale_flex.calibration.weights.fingerprint`)."""

    def __post_init__(self) -> None:
        if self.thresholds.dim() != 2 or len(self.thresholds) != len(self.layers):
            raise ValueError(
                f"thresholds must have shape [{len(self.layers)}, heads], a row for each of the layers {self.layers}, "
                f"got {list(self.thresholds.shape)}."
            )
        for on, name in ((self.on, ""), (self.transfer, "transfer_")):
            for field in ("errors", "densities"):
                if on is not None and getattr(on, field).shape != self.thresholds.shape:
                    raise ValueError(
                        f"{name}{field} must have the thresholds' shape {list(self.thresholds.shape)}, got "
                        f"{list(getattr(on, field).shape)}."
                    )
        if not bool((self.thresholds >= 0).all() & self.thresholds.isfinite().all()):
            raise ValueError(f"thresholds must be 0 or more and finite, got {self.thresholds.tolist()}.")

    @property
    def errors(self) -> Tensor:
        """float32 ``[layers, heads]``: reached on the texts of the calibration, the largest of them."""
        return self.on.errors

    @property
    def densities(self) -> Tensor:
        """float32 ``[layers, heads]``: blocks kept over blocks visible on those texts."""
        return self.on.densities

    @property
    def dense_heads(self) -> int:
        """How many heads are dense because no threshold kept their error within the target."""
        used = [n for n, layer in enumerate(self.layers) if layer not in self.unused]
        return int((self.thresholds[used] == 0).sum())

    def layer_config(
        self, layer: int, heads: slice | None = None, device: torch.device | str | None = None
    ) -> SaleConfig:
        """The config with which `sale_attention` runs a layer.

        Args:
            layer: Its ``layer_idx``.
            heads: Part of the query heads, for a process that has no others.
            device: Where the thresholds are wanted.

        Returns:
            The calibrated config with thresholds float32 ``[heads]``. If all are 0, its ``min_length`` is beyond every
            length, so that nothing is estimated.

        Raises:
            ValueError: There is no such layer.
        """
        if layer not in self.layers:
            raise ValueError(f"layer must be one of the calibrated ones, {_ranges(self.layers)}, got {layer}.")
        thresholds = self.thresholds[self.layers.index(layer)][slice(None) if heads is None else heads]
        return with_thresholds(self.config, thresholds.to(device))

    def check_fits(self, layers: Mapping[int, int]) -> None:
        """Raise ValueError if a model has other layers or heads.

        Args:
            layers: ``layer_idx`` -> query heads of the model's attention layers, those of all processes together.
        """
        heads = self.thresholds.shape[1]
        if set(layers) != set(self.layers) or set(layers.values()) != {heads}:
            theirs = " or ".join(map(str, sorted(set(layers.values()))))
            raise ValueError(
                f"the calibration is of layers {_ranges(self.layers)} with {heads} query heads ({self.model}), but the "
                f"model has layers {_ranges(sorted(layers))} with {theirs}; calibrate this model: sale-flex calibrate."
            )

    def check_weights(self, model: torch.nn.Module) -> None:
        """Warn if a model has other weights than the one that was calibrated.

        The dtype in which it was loaded makes no difference, nor does its device. Nothing is said where the weights of
        one of the two could not be hashed: under tensor parallelism, with weights offloaded, or in a tensor type of
        their own.

        Args:
            model: A model of transformers, or the part of one with all its attention layers.

        Warns:
            UserWarning: It has; the message names the parts.
        """
        others = differing(self.weights, fingerprint(model))
        if others:
            warnings.warn(
                f"the calibration is of {self.model} with weights other than this model's: {' and '.join(others)} "
                f"differ. Its thresholds may leave errors above {self.goal.target:g} here; calibrate this model: "
                "sale-flex calibrate. (So does a float32 checkpoint that was loaded as bfloat16 there and as float16 "
                "here, or the other way round.)",
                stacklevel=3,
            )

    def __str__(self) -> str:
        rows, heads = self.thresholds.shape
        config, goal = self.config, self.goal
        rule = config.rule.describe()
        blocks = f"{config.block_size[0]}x{config.block_size[1]}"
        lines = [
            f"Calibration of {self.model}: {rows} layers x {heads} heads, {rule}, {blocks} blocks",
            f"{goal.error} error allowed {goal.target:g}; {self.dense_heads} of {rows * heads} heads dense to meet it",
        ]
        found = self.thresholds[self.thresholds > 0]
        if len(found):
            lines.append(f"thresholds {found.min():.3g} to {found.max():.3g}, median {found.median():.3g}")
        if self.unused:
            lines.append(
                f"layers {_ranges(self.unused)} dense, not calibrated: texts left no choice there (min_length, windows)"
            )
        lines.append(self.on.describe())
        if self.transfer is not None:
            lines.append(f"on texts of another kind: {self.transfer.describe()}")
        lines.append("The error is of one layer alone: judge quality by the loss.")
        return "\n".join(lines)

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """All but the tensors, as JSON takes it: the content of ``config.json``."""
        return {
            "format": FORMAT,
            "model": self.model,
            "revision": self.revision,
            "dtype": self.dtype,
            "device": self.device,
            "weights": None if self.weights is None else {part: dict(each) for part, each in self.weights.items()},
            "layers": list(self.layers),
            "heads": self.thresholds.shape[1],
            "config": stored_config(self.config),
            **asdict(self.goal),
            "dense_heads": self.dense_heads,
            "unused": list(self.unused),
            "on": self.on.to_dict(),
            "transfer": None if self.transfer is None else self.transfer.to_dict(),
            "versions": dict(self.versions or {}),
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``thresholds.safetensors``; each is the old one or the new one at any moment.

        Raises:
            ModuleNotFoundError: safetensors is not installed.
            OSError: The folder can not be made or written.
        """
        from safetensors.torch import save

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"thresholds": self.thresholds, "errors": self.errors, "densities": self.densities}
        if self.transfer is not None:
            tensors |= {"transfer_errors": self.transfer.errors, "transfer_densities": self.transfer.densities}
        draft = folder / f"{TENSORS}.part"
        try:
            draft.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
            draft.replace(folder / TENSORS)
        finally:
            draft.unlink(missing_ok=True)
        write_json(folder / CONFIG, self.to_dict())

    @classmethod
    def from_pretrained(cls, folder_or_repo_id: str | Path, revision: str | None = None) -> Self:
        """Read a folder, or download it from the Hugging Face hub.

        Args:
            folder_or_repo_id: A local folder, or ``owner/name`` on the hub.
            revision: Branch, tag or commit on the hub.

        Raises:
            FileNotFoundError: There is no such folder, or it lacks a file.
            ModuleNotFoundError: safetensors, or huggingface_hub for what is not local, is not installed.
            ValueError: The files are of another format, or do not fit each other.
        """
        folder = Path(folder_or_repo_id)
        if not folder.is_dir():
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder_or_repo_id)) or str(folder_or_repo_id).startswith("."):
                raise FileNotFoundError(
                    f"{folder_or_repo_id} is no folder, and no owner/name on the hub; `sale-flex calibrate --out` "
                    "writes a calibration."
                )
            from huggingface_hub import snapshot_download

            found = snapshot_download(str(folder_or_repo_id), revision=revision, allow_patterns=[CONFIG, TENSORS])
            folder = Path(found)
        return cls(**read_fields(folder))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload calibration",
    ) -> str:
        """Upload to the Hugging Face hub, where the repository is made if it is not there.

        Args:
            repo_id: ``owner/name``.
            revision: Branch to upload to.
            private: Whether a new repository is private.
            token: Of the hub; by default the one that is stored on this machine.
            commit_message: Of the upload.

        Returns:
            The commit's address.

        Raises:
            ModuleNotFoundError: huggingface_hub or safetensors is not installed.
        """
        from tempfile import TemporaryDirectory

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
            )
        return str(commit.commit_url)


def with_thresholds(config: SaleConfig, thresholds: Tensor) -> SaleConfig:
    """`config` with thresholds ``[heads]``, and all dense by length if all are 0. `thresholds` are read."""
    dense = not bool(thresholds.any())
    return replace(config.with_threshold(thresholds), min_length=EVERY_ROW if dense else config.min_length)


def _ranges(layers: tuple[int, ...] | list[int]) -> str:
    """``0-5, 7`` of 0 to 5 and 7."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
