# SPDX-License-Identifier: BSD-3-Clause
"""What thresholds come to on texts: error and density of every head, and the loss beside dense attention's."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


class Text(NamedTuple):
    """A text, by what tells it from others, and the model's loss on it."""

    sha256: str
    """Of its token ids and its attention mask."""
    shape: tuple[int, int]
    """Batch rows and tokens."""
    targets: int
    """Tokens that are predicted."""
    loss_dense: float
    """Mean over them, in nats, with dense attention in every layer."""
    loss_sparse: float
    """The same with the thresholds."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Errors, densities and losses on some texts."""

    errors: Tensor
    """float32 ``[layers, heads]``: of a head's output beside dense attention's in the same layer of a dense model; the
    largest of the texts."""
    densities: Tensor
    """float32 ``[layers, heads]``: blocks kept over blocks visible, of all texts."""
    texts: tuple[Text, ...]

    @property
    def loss_dense(self) -> float:
        """Mean over all predicted tokens, in nats."""
        return self._mean([text.loss_dense for text in self.texts])

    @property
    def loss_sparse(self) -> float:
        """The same with the thresholds in every layer."""
        return self._mean([text.loss_sparse for text in self.texts])

    @property
    def rise(self) -> float:
        """In loss, over dense."""
        return self.loss_sparse - self.loss_dense

    @property
    def density(self) -> float:
        """Mean over layers and heads."""
        return self.densities.mean().item()

    def _mean(self, losses: list[float]) -> float:
        targets = [text.targets for text in self.texts]
        return sum(loss * count for loss, count in zip(losses, targets)) / sum(targets)

    def describe(self) -> str:
        """A line on the errors and one on the loss."""
        tokens = ", ".join(f"{rows} x {length}" if rows > 1 else f"{length}" for _, (rows, length), *_ in self.texts)
        return (
            f"error mean {self.errors.mean():.4f}, largest {self.errors.max():.4f}; density {self.density:.3f}\n"
            f"loss dense {self.loss_dense:.4f}, calibrated {self.loss_sparse:.4f}: rise {self.rise:+.4f} on "
            f"{len(self.texts)} text{'s' * (len(self.texts) != 1)} of {tokens} tokens"
        )

    def to_dict(self) -> dict[str, Any]:
        """All but the tensors, as JSON takes it."""
        return {
            "loss_dense": self.loss_dense,
            "loss_sparse": self.loss_sparse,
            "error_mean": self.errors.mean().item(),
            "error_largest": self.errors.max().item(),
            "density": self.density,
            "texts": [{**text._asdict(), "shape": list(text.shape)} for text in self.texts],
        }
