"""One attention site that cannot be pruned is exact, with its reason, and its neighbours are pruned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import call, compile_eager, padded, run
from tiny import prompt, tiny
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

import specpass

W, C = 8, 24
PROMPTS = [prompt(60), prompt(44, seed=1)]
SNAP = specpass.SnapKV(budget=C, window=W)
COVERING = specpass.SpecKV(budget=128, window=W, lookahead_ids=prompt(5, seed=7))
READ = specpass.SpecPC(budget=C, window=W, kernel=5, neighbours=3)


class AttentionOverMixedKeys(LlamaAttention):
    """Keys are mixed with their neighbours' behind the cache: what was dropped would be missed."""

    mixes, distance = True, 0

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        key, value = past_key_values.update(key, value, self.layer_idx)
        rows, columns = query.shape[2], key.shape[2]
        if self.mixes:
            key = key + 0.5 * torch.cat([torch.zeros_like(key[:, :, :1]), key[:, :, :-1]], 2)
        row, column = torch.arange(columns)[columns - rows :, None], torch.arange(columns)
        mask = (column <= row)[None, None]
        if self.distance:
            mask = mask & ((row - column) % self.distance != self.distance - 1)
        if attention_mask is not None:
            mask = mask & attention_mask
        states = (heads.repeat_interleave(self.num_key_value_groups, 1) for heads in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, *states, mask, scale=self.scaling)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


class AttentionWithGaps(AttentionOverMixedKeys):
    """Each query leaves out every fifth position in front of it."""

    mixes, distance = False, 5


def odd(kind: type[LlamaAttention]) -> Any:
    """Three layers, of which the second is odd."""
    model = tiny(layers=3)
    model.model.layers[1].self_attn.__class__ = kind
    return model


class Models:
    def __init__(self, kind: type[LlamaAttention]) -> None:
        self.kind, self.plain = kind, odd(kind)
        self.snap, self.covering = compile_eager(odd(kind), SNAP), compile_eager(odd(kind), COVERING)


@pytest.fixture(scope="module", params=[AttentionOverMixedKeys, AttentionWithGaps])
def models(request: pytest.FixtureRequest) -> Models:
    return Models(request.param)


def test_the_others_are_pruned_and_the_report_says_why_not_this(models: Models) -> None:
    cache = specpass.BudgetCache(models.plain.config, SNAP, 8)
    ours = call(models.snap, PROMPTS[0], cache)
    torch.testing.assert_close(ours, call(models.plain, PROMPTS[0], DynamicCache()), atol=1e-4, rtol=1e-4)
    assert [layer.lengths.unique().tolist() for layer in cache.layers] == [[C], [60], [C]]
    sites = specpass.report(models.snap).prompts[0].sites
    assert [(site.module, site.budget) for site in sites] == [
        (f"model.layers.{index}.self_attn", budget) for index, budget in enumerate((C, 0, C))
    ]
    why = {
        AttentionOverMixedKeys: "keys and values change between the cache and",
        AttentionWithGaps: "its mask is not that of full",
    }
    assert sites[1].exact.startswith(why[models.kind])
    assert "prompt: 2 of 3 attention layers pruned" in str(specpass.report(models.snap))


@pytest.mark.parametrize("early_exit", [True, False])
def test_covering_budget_is_exact(models: Models, early_exit: bool) -> None:
    """Padded, over two turns."""
    answers: list[list[list[int]]] = []
    for model in (models.covering, models.plain):
        ours = {"early_exit": early_exit, "lookahead_ids": prompt(5, batch=2, seed=7)}
        cache: Any = (
            DynamicCache() if model is models.plain else specpass.BudgetCache(model.config, COVERING, 8, **ours)
        )
        ids, mask = padded(PROMPTS)
        for turn in (1, 2):
            found = run(model, ids, 4, mask=mask, past_key_values=cache)
            answers.append(found.tokens)
            ids = torch.cat([ids, torch.tensor(found.tokens), prompt(3, batch=2, seed=turn)], 1)
            mask = torch.cat([mask, mask.new_ones(2, 7)], 1)
    assert answers[:2] == answers[2:]


def test_padded_batch_beams_and_crop(models: Models) -> None:
    model, (ids, mask) = models.snap, padded(PROMPTS)
    batch = run(model, ids, mask=mask)
    if models.kind is AttentionWithGaps:  # mixed keys read padding, in the plain model as well
        for row, own in enumerate(PROMPTS):
            assert batch.tokens[row] == run(model, own).tokens[0]
    cache = specpass.BudgetCache(model.config, SNAP, 8)
    greedy = run(model, PROMPTS[0], past_key_values=cache)
    cache.crop(-3)
    again = torch.tensor([greedy.tokens[0][2:5]])
    told = torch.arange(62, 65)[None]
    torch.testing.assert_close(
        call(model, again, cache, position_ids=told)[0, -1], greedy.logits[0, 5], atol=1e-4, rtol=0
    )
    beams = model.generate(PROMPTS[0], attention_mask=torch.ones_like(PROMPTS[0]), num_beams=2, max_new_tokens=4)
    assert beams.shape == (1, 64)


def test_specpc_needs_nothing_of_it(models: Models) -> None:
    model = compile_eager(odd(models.kind), READ, draft=tiny())
    ours = run(model, PROMPTS[0])
    read = PROMPTS[0][:, ours.cache.prompt_positions[0]]
    assert read.shape[1] == C
    assert ours.tokens == run(models.plain, read).tokens
