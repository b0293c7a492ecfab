# SPDX-License-Identifier: BSD-3-Clause
"""Structure for random models: weights and prompts with which their attention concentrates, so that rules drop blocks.

Random projections spread attention evenly, and whatever is tested of a choice of blocks is then tested of none.
"""

import torch
from torch import Tensor

import sale_flex.integrations.transformers as sale_hf

TOPICS = 8
FIRST = 2
"""Token ids below it mean something."""
GAIN = 4.0
"""Of queries over keys: tokens of one topic then have logits of about 7, of two topics of about 0."""


@torch.no_grad()
def plant_topics(model: torch.nn.Module) -> torch.nn.Module:
    """Make tokens attend to those of their own topic; the model, whose weights are changed in place.

    Tokens of a topic share most of their embedding. Every query projection is tied to its group's key projection in the
    channels that rotary embeddings turn slowest, so that a topic is recognised over any distance.

    Args:
        model: A decoder with separate projections, rotary embeddings over halves of its heads, and the vocabulary that
            `passages` draws from.
    """
    embedding = model.get_input_embeddings().weight
    each = _words(embedding.shape[0])
    for topic in range(TOPICS):
        own = embedding[FIRST + topic * each : FIRST + (topic + 1) * each]
        own.copy_(own / 4 + own.mean(0) * each**0.5)
    for module in sale_hf.attention_layers(model).values():
        query, key = module.q_proj.weight, module.k_proj.weight
        heads = key.view(-1, module.head_dim, key.shape[1]).repeat_interleave(query.shape[0] // key.shape[0], 0)
        half = module.head_dim // 2
        slow = torch.arange(module.head_dim) % half >= half * 3 // 4
        query.copy_((heads * slow[:, None] * GAIN).reshape(query.shape))
    return model


def passages(batch: int, length: int, vocabulary: int = 64, seed: int = 1) -> Tensor:
    """int64 ``[batch, length]``: every 64 tokens are on one of the topics."""
    generator = torch.Generator().manual_seed(seed)
    topic = torch.randint(TOPICS, (batch, -(-length // 64)), generator=generator).repeat_interleave(64, 1)[:, :length]
    each = _words(vocabulary)
    return FIRST + topic * each + torch.randint(each, (batch, length), generator=generator)


def _words(vocabulary: int) -> int:
    return (vocabulary - FIRST) // TOPICS
