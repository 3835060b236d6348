"""Tokens behind a prompt: each pruned layer appends to its slots, and its attention goes over those in use.

The model builds its masks in its own columns; at pruned sites nobody reads them, at exact ones they hold.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specpass.cache.budget import BudgetCache
from specpass.dialect.define import SPEC
from specpass.errors import CacheStateError, UnsupportedCallError
from specpass.interpret.rows import Packing
from specpass.interpret.watch import Attention, Listener, Watch


class Steps(Listener):
    """One call of q tokens; `packing` of the block, whose padding takes no slot.

    Args: causal: known of the model's masks; else they are looked at.
    """

    def __init__(self, cache: BudgetCache, packing: Packing, *, causal: bool = True) -> None:
        self.cache, self.packing, self.causal = cache, packing, causal
        cache.hear(cache.budgeted[0].lengths)
        pruned = any(not layer.exact for layer in cache.budgeted) and not cache.exact
        self.watch = Watch(self) if pruned else None
        self.heads: dict[int, int] = {}  # of layers that were written, query heads; 0: nobody has read them yet
        self.count = 0  # q

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        own = self.cache.layers[layer]
        if own.exact or self.cache.exact:
            own.key_buffer, own.value_buffer = SPEC.extend_kv(own.keys, own.values, key, value)
            own.lengths.add_(key.shape[2])
            return own.keys, own.values
        if own.biased:
            raise CacheStateError(
                f"layer {layer} adds a bias by the positions of its keys (ALiBi), which only its graph knows: call the "
                "model as it was called for the prompt."
            )
        packed = (self.packing.states(states) for states in (key, value))
        SPEC.append_kv(own.key_buffer, own.value_buffer, own.lengths, *packed, None, None, own.starts)
        self.heads[layer], self.count = 0, key.shape[2]
        assert self.watch is not None, "this layer is pruned"
        if own.made:  # the model makes what attention reads of all slots
            key, value = own.keys, own.values
        self.watch.follow(layer, key, value)
        return key, value

    def attend(self, layer: int, call: Attention, made: bool) -> Tensor:
        """Over the layer's slots, for its own queries and for those of layers that share them.

        Raises: CacheStateError: it reads them in another way than the prompt's.
        """
        if self.cache.layers[layer].exact:
            return call.run()
        if made != self.cache.layers[layer].made:
            raise CacheStateError(
                f"layer {layer} was pruned, and now its keys and values change on the way to attention, so the answer "
                "would be wrong: leave the model as it was when the prompt was read."
            )
        own, given, heads = self.cache.layers[layer], call.query.shape, self.heads[layer]
        if not self.causal and not heads:
            check_causal(call.mask, self.count)
        call = call.of_heads(heads) if heads else call.unfolded(self.count)
        packing = self.packing if self.packing.order is None else self.packing.on(call.query.device)
        query, rows = call.query, call.query.shape[2]  # a layer that shares may compute the last rows alone
        self.heads[layer] = query.shape[1]
        order = packing.order
        if order is not None:
            query = packing.states(F.pad(query, (0, 0, self.count - rows, 0)))
        keys, values, lengths = own.key_buffer, own.value_buffer, own.lengths
        if own.starts is None:
            keys, values = own.stored(keys), own.stored(values)
        if made:
            keys, values = call.key, call.value
            lengths = lengths if keys.shape[1] == own.kv_heads else lengths[:, :1].expand(-1, keys.shape[1])
        bounds = () if own.span is None or not own.span.positions else (0.0, None, own.span.sliding, own.span.chunk)
        asked = query.to(keys.dtype)
        if own.prompt is not None:
            out = SPEC.attend_cascade(asked, keys, values, lengths, own.prompt, call.scale, *bounds)
        else:
            how = {} if own.quantized is None else {"quantized": own.quantized, "bits": own.bits}
            if own.starts is not None:
                how = {"offsets": own.starts, "layers": len(own.together)}
            out = SPEC.attend(asked, keys, values, lengths, call.scale, *bounds, **how)
        out = out.to(query.dtype)
        if not heads and own.queries is not None:  # the layer's own, not those of others that share it
            padding = None if order is None else self.count - packing.lengths
            SPEC.note_queries(own.queries, query, call.scale, padding)
        if order is not None:
            back = SPEC.unpack_index(order)[:, None, -rows:, None]
            out = out.gather(2, back.expand(-1, out.shape[1], -1, out.shape[3]))
        return out.reshape(*given[:3], out.shape[3])

    def finish(self) -> None:
        """Raises: CacheStateError: a pruned layer was not read by the attention that pruned it."""
        unread = [layer for layer, heads in self.heads.items() if not heads]
        if unread:
            raise CacheStateError(
                f"layer {min(unread)} was pruned, and now no scaled_dot_product_attention reads it, so the answer "
                "would be wrong: leave the model's attn_implementation as it was when the prompt was read."
            )
        if self.packing.order is not None:  # the next token overwrites padding
            for layer in self.heads:
                lengths = self.cache.layers[layer].lengths
                lengths.sub_((self.count - self.packing.on(lengths.device).lengths)[:, None])


def check_causal(mask: Tensor | None, count: int) -> None:
    """A model's mask [B, 1, q, M] for `count` tokens behind a pruned prompt.

    Raises: UnsupportedCallError: some of them read what is behind them, as an image's tokens do in some models.
    """
    if mask is None or count == 1:
        return
    block = mask[..., -count:]
    allowed = block if mask.dtype == torch.bool else block > torch.finfo(mask.dtype).min / 2
    if bool(allowed.triu(1).any()):
        raise UnsupportedCallError(
            "an image comes behind a prompt that was pruned, and this model lets an image's tokens see each other both "
            "ways, which slots of a cache do not: pass all images with the first prompt, or call cache.reset() and "
            "read the whole conversation anew."
        )


def block_packing(like: Tensor, mask: Tensor | None) -> Packing:
    """Of q new tokens like [B, q, ...] under a mask [B, >= q] whose last columns are theirs."""
    if mask is None or like.shape[1] == 1 or mask.dim() != 2:
        return Packing.of(like, None)
    return Packing.of(like, mask[:, -like.shape[1] :])
