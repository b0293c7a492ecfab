# SPDX-License-Identifier: BSD-3-Clause
"""What the torch.compile that is tracing us will do with a block mask."""

import torch


@torch.compiler.assume_constant_result
def inductor_is_tracing() -> bool:
    """Whether the code being traced goes to Inductor, whose flex_attention follows block indices.

    Other backends (``"eager"``, ``"aot_eager"``, a custom one) may compute flex_attention densely under its mask_mod.
    Torch has no public way to ask; where the private one is gone, the answer is no, which is slower but never wrong.
    """
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        backend = InstructionTranslator.current_tx().output.compiler_fn
        return getattr(backend, "_compiler_name", None) == "inductor"
    except (ImportError, AttributeError):
        return False
