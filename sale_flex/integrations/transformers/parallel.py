# SPDX-License-Identifier: BSD-3-Clause
"""Tensor parallelism: which of a layer's heads this process has."""

import torch


def local_heads(model: torch.nn.Module, heads: int) -> slice:
    """This process's part of `heads` query heads; all of them without tensor parallelism.

    Raises:
        ValueError: The heads can not be shared out evenly.
    """
    size = getattr(model, "_tp_size", None) or 1
    if size == 1:
        return slice(0, heads)
    if heads % size:
        raise ValueError(
            f"model must have a number of query heads that its {size} tensor parallel processes divide, got {heads}."
        )
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None:
        raise ValueError("model has a tensor parallel size but no device mesh; load it with tp_plan='auto'.")
    names = mesh.mesh_dim_names or ()
    rank = mesh["tp"].get_local_rank() if "tp" in names and len(names) > 1 else mesh.get_local_rank()
    share = heads // size
    return slice(rank * share, (rank + 1) * share)
