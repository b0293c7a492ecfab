# SPDX-License-Identifier: BSD-3-Clause
"""`create_sale_block_mask`: from a rule's hit bits to a FlexAttention `BlockMask`."""

from typing import Literal, NamedTuple, TypedDict, Unpack, overload

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sale_flex.call.autocast import autocast_inputs, without_autocast
from sale_flex.call.facts import check_arguments, settle, wants_grad
from sale_flex.call.stages import build
from sale_flex.call.user_mods import UserMods
from sale_flex.config import SaleConfig
from sale_flex.mods import MaskMod, ScoreMod
from sale_flex.selection.key_codes import KeyCodes
from sale_flex.stats import SaleStats


class MaskResult(NamedTuple):
    """A block mask and what it cost, for callers who asked for ``stats=True``."""

    block_mask: BlockMask
    stats: SaleStats


class MaskOptions(TypedDict, total=False):
    """The options of `create_sale_block_mask` whose types do not change its result."""

    value: Tensor | None
    score_mod: ScoreMod | None
    mask_mod: MaskMod | None
    block_mask: BlockMask | None
    is_causal: bool
    estimate_mods: str
    q_offset: int | Tensor | None
    kv_range: Tensor | None
    scale: float | None
    key_codes: KeyCodes | None


@overload
def create_sale_block_mask(
    query: Tensor, key: Tensor, config: SaleConfig = ..., *, stats: Literal[False] = ..., **options: Unpack[MaskOptions]
) -> BlockMask: ...
@overload
def create_sale_block_mask(
    query: Tensor, key: Tensor, config: SaleConfig = ..., *, stats: Literal[True], **options: Unpack[MaskOptions]
) -> MaskResult: ...
def create_sale_block_mask(
    query: Tensor,
    key: Tensor,
    config: SaleConfig = SaleConfig(),  # noqa: B008 - frozen
    *,
    value: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    block_mask: BlockMask | None = None,
    is_causal: bool = True,
    estimate_mods: str = "apply",
    q_offset: int | Tensor | None = None,
    kv_range: Tensor | None = None,
    scale: float | None = None,
    key_codes: KeyCodes | None = None,
    stats: bool = False,
) -> BlockMask | MaskResult:
    """Choose the blocks of the attention map that matter.

    The mask is exact on what it keeps: its ``mask_mod`` is that of the call and *kept*, so that even uncompiled
    flex_attention, which ignores block indices, attends to the kept blocks alone. The choice has no gradient; where
    query or key requires one, the mask has what flex_attention's backward pass needs.

    Under torch.autocast of the query's device type, query, key and value are cast as flex_attention casts them there:
    the mask is chosen from what attention will get.

    Args:
        query: ``[B, Hq, Sq, D]``, float32, float16 or bfloat16, any strides.
        key: ``[B, Hkv, Skv, D]``, Hq a multiple of Hkv, the query's device and, without autocast, its dtype.
        config: What to keep; see `SaleConfig`.
        value: ``[B, Hkv, Skv, D]``. If given, blocks with a non-finite value are kept, as attention would show them.
        score_mod: ``score_mod(score, b, h, q_idx, kv_idx)`` as flex_attention takes it. The estimate applies it; hand
            it to flex_attention too.
        mask_mod: ``mask_mod(b, h, q_idx, kv_idx)`` as flex_attention takes it: what is hidden besides. Blocks that it
            hides cost nothing where it carries a ``key_range`` (see `sale_flex.mods`), and little where not.
        block_mask: A BlockMask of the call's lengths, of which only listed blocks are kept, with blocks of a multiple
            or a divisor of ``config.block_size``. Its mask_mod must hold in its full blocks, as it does in every mask
            of create_block_mask.
        is_causal: Whether a query sees no key behind its own position. False leaves that to the masks.
        estimate_mods: ``"apply"``, or ``"ignore"`` to leave score_mod and mask_mods out of the estimate: for mods with
            operations that it can not follow. They are exact in attention either way.
        q_offset: Key index of the first query: an int, or an integer tensor ``[]`` or, for rows that stand at different
            places, ``[B]``; by default ``Skv - Sq``. Mods get row numbers of the query, as everywhere in
            FlexAttention, and no positions.
        kv_range: int ``[B, 2]``, first and one-past-last valid key of each batch row; by default all keys. Queries that
            stand outside it are padding and see nothing.
        scale: Softmax scale; by default ``D ** -0.5``.
        key_codes: A `KeyCodes`, which keeps codes of keys from chunk to chunk of a prompt: the same blocks are chosen,
            and only new keys are coded. Beside it `q_offset` must be an int or left out.
        stats: Also return what was kept.

    Returns:
        A BlockMask of shape ``[B, Hq, Sq, Skv]`` with ``config.block_size`` blocks and ascending, disjoint lists of
        partial and full blocks. On a GPU, lists of more than 1,024 key blocks are compact: narrower than the map, which
        BlockMask.to_dense does not know; `sale_flex.testing.block_map` does. With ``stats=True`` a `MaskResult`.

    Raises:
        TypeError, ValueError: An argument breaks its rule; the message names both.
        NotImplementedError: The estimate can not follow an operation of a mod; or `key_codes` under torch.compile.
    """
    mods = UserMods(score_mod, mask_mod, block_mask, is_causal, estimate_mods)
    query, key, value = autocast_inputs(query, key, value)
    with without_autocast(query):
        given = check_arguments(query, key, value, config, mods, q_offset, kv_range, scale, key_codes)
        built = build(settle(given, backward=wants_grad(query, key, value), wants_audit=stats))
        return MaskResult(built.block_mask, built.counts()) if stats else built.block_mask
