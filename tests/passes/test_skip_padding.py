"""skip_padding: masked tokens of an appended block take no slot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from graph_text import check_count, text
from graphs import HANDLE, SNAPKV, by_head, check_contract, insert, stored
from traces import prompt_graph, step_graph

from specpass.graph.edit import copy_module
from specpass.graph.walk import ATEN
from specpass.passes.facts import Inputs
from specpass.passes.skip_padding import SkipPadding
from specpass.rewrite import Refusal
from specpass.rewrite.sites import Sites

SEEN = torch.tensor(60)
TOKENS = torch.tensor([[9, 9, 5, 7], [3, 9, 8, 11], [4, 6, 2, 1]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1]])
POSITIONS = 60 + (MASK.cumsum(1) - 1).clamp(min=0)
USED = (24, 17, 20)


def test_text() -> None:
    state = step_graph(SNAPKV, kind="append", mask=True, positions=True).after("skip_padding")
    assert_expected_inline(
        text(state.gm),
        """\
pack_appended(attention_mask, input_ids)
take_rows(add, pack_appended[0])
take_rows(transpose, pack_appended[0])
append_kv(key_buffer_0, value_buffer_0, lengths_0, take_rows, take_rows, handle)
advance(seen, None, sym_size)
take_rows(add, pack_appended[0])
attend(take_rows, view, view, lengths_0, 0.25)
take_rows(attend, pack_appended[1])
take_back(lengths_0, pack_appended[2])""",
    )


@pytest.mark.parametrize("kind", ["append", "decode"])
def test_count(kind: Any) -> None:
    state = step_graph(SNAPKV, kind=kind, mask=True, positions=True, layers=2).after("skip_padding")
    check_count(state.gm, pack_appended=1, take_rows=8, append_kv=2, attend=2, take_back=2)


def test_numbers_of_a_padded_row_are_those_of_its_own_tokens() -> None:
    """Logits at real tokens, what is stored, and the slots in use; padding on the left, in between and nowhere."""
    state = step_graph(SNAPKV, kind="append", mask=True, positions=True).after("skip_padding")
    plain = step_graph(SNAPKV, kind="append", positions=True).after("attend_slots")
    caches = stored(*USED)
    together = state.run(TOKENS, HANDLE, SEEN.clone(), MASK, POSITIONS, *caches)["logits"]
    for row, used in enumerate(USED):
        real = MASK[row].bool()
        own = [part[[row]] for part in stored(*USED)]
        alone = plain.run(TOKENS[[row]][:, real], HANDLE, SEEN.clone(), POSITIONS[[row]][:, real], *own)["logits"]
        torch.testing.assert_close(together[row, -1], alone[0, -1])
        count = used + int(real.sum())
        assert caches[2][row].tolist() == own[2][0].tolist() == [count, count]
        for ours, theirs in zip(caches[:2], own[:2], strict=True):
            torch.testing.assert_close(by_head(ours)[row, :, :count], by_head(theirs)[0, :, :count])


def test_leaves_steps_without_a_mask_and_prompts() -> None:
    for state in (
        step_graph(SNAPKV, kind="append", positions=True).before("skip_padding"),
        prompt_graph(SNAPKV, mask=True).before("skip_padding"),
    ):
        before = text(copy_module(state.gm))
        assert text(state.apply(SkipPadding()).gm) == before


def test_leaves_a_model_that_reads_the_mask_itself() -> None:
    state = step_graph(SNAPKV, kind="append", mask=True, positions=True).before("skip_padding")
    mask, site = state.facts[Inputs].mask, state.facts[Sites].sites[0]
    other = insert(state, ATEN.add.Tensor, mask, mask, before=site.attention)
    with pytest.raises(Refusal, match=r"read outside attention \(by aten\.add"):
        state.returning(other=other).apply(SkipPadding())


def test_alone() -> None:
    check_contract(
        SkipPadding(),
        lambda: step_graph(SNAPKV, kind="append", mask=True, positions=True).before("skip_padding"),
        Inputs,
    )
