"""What a notebook shows of a cache: a line of text and a picture."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
import torch
from tiny import prompt, tiny

import specpass
from specpass.observe import kept

C, S = 24, 60


@pytest.fixture(scope="module")
def filled() -> specpass.BudgetCache:
    model, method = tiny(layers=2), specpass.SnapKV(budget=C, window=8)
    specpass.compile(model, method=method, lowering="eager")
    return model.generate(prompt(S), max_new_tokens=3, do_sample=False, return_dict_in_generate=True).past_key_values


def test_binning_keeps_shares() -> None:
    matrix = np.array([[True, True, False, False, True]])
    assert kept.binned(matrix, bins=3).tolist() == [[1.0, 0.0, 1.0]]
    assert kept.binned(matrix, bins=10).tolist() == [[1.0, 1.0, 0.0, 0.0, 1.0]]


def test_a_cache_shows_what_it_kept(filled: specpass.BudgetCache) -> None:
    from matplotlib.image import imread

    text = filled._repr_html_()
    assert "SnapKV" in text
    assert f"{C} of {S} prompt tokens" in text
    found = re.search(r"base64,([\w+/=]+)", text)
    assert found is not None
    image = imread(io.BytesIO(base64.b64decode(found.group(1))), format="png")
    assert image.shape == (2 * 2, S, 3)  # two layers of two KV heads
    blue = image[..., 0] < 0.5
    for index, layer in enumerate(kept.kept_positions(filled)):
        for head, positions in enumerate(layer):
            assert torch.equal(torch.tensor(blue[2 * index + head]).nonzero().flatten(), torch.tensor(positions))


def test_an_empty_cache_says_so() -> None:
    cache = specpass.BudgetCache(tiny().config, specpass.SnapKV(budget=C, window=8))
    assert "no prompt was read yet" in cache._repr_html_()


def test_a_report_is_tables_in_html() -> None:
    model = specpass.compile(tiny(), method=specpass.SnapKV(budget=C, window=8), lowering="eager")
    model.generate(prompt(S), max_new_tokens=2, do_sample=False)
    text = specpass.report(model)._repr_html_()
    assert text.startswith("<pre")
    assert "prefill" in text
    assert "KV cache" in text
    assert "<script" not in text
