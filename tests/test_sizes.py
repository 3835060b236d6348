"""What is read from configs, whichever form it has there."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import tiny
from transformers import BloomConfig, GenerationConfig

from specpass.sizes import context_length, eos_ids


@pytest.mark.parametrize(("given", "ids"), [(None, ()), (7, (7,)), ([7, 9], (7, 9)), (0, (0,))])
def test_eos_ids_are_a_tuple(given: Any, ids: tuple[int, ...]) -> None:
    assert eos_ids(GenerationConfig(eos_token_id=given)) == ids
    assert eos_ids(tiny(layers=1, eos=given).config) == ids


def test_a_context_is_what_the_config_says() -> None:
    config = tiny(layers=1).config
    assert context_length(config) == config.max_position_embeddings == 4096
    assert context_length(BloomConfig()) is None  # ALiBi reads any length
