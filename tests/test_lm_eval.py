"""lm-evaluation-harness on a tiny model and a local task: what it asks is answered from pruned caches."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_models import save_model
from transformers import AutoTokenizer, DynamicCache

from specpass.errors import UnsupportedCallError
from specpass.testing import eager

BUDGET, WINDOW = 24, 8
TEXT = " ".join(f"w{index % 90}" for index in range(60))
TASK = """\
task: specpass_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
{rest}
"""
KINDS = {
    "generate_until": "doc_to_target: w1\ngeneration_kwargs: {until: [w119], max_gen_toks: 4}\n",
    "multiple_choice": "doc_to_target: 0\ndoc_to_choice: [w5, w7 w9 w11]\n",
}


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder of tasks, pruned model) of the harness."""
    pytest.importorskip("lm_eval")
    from specpass.lm_eval import PrunedLM

    root = tmp_path_factory.mktemp("lm_eval")
    data = root / "docs.jsonl"
    data.write_text("".join(json.dumps({"text": f"w{index} {TEXT}"}) + "\n" for index in range(2)))
    for kind, rest in KINDS.items():
        (root / f"{kind}.yaml").write_text(TASK.format(kind=kind, data=data, rest=rest))
    folder = save_model(root / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "<s>"  # the harness ends every answer with it
    tokenizer.save_pretrained(folder)
    arguments = {"method": "snapkv", "budget": BUDGET, "window": WINDOW, "lowering": "eager", "device": "cpu"}
    return root, PrunedLM(str(folder), batch_size=2, **arguments)


def evaluate(root: Path, model: Any, kind: str) -> list[Any]:
    """What the harness was answered, of each document."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(root), include_defaults=False)
    out = simple_evaluate(model, tasks=[f"specpass_{kind}"], task_manager=tasks, bootstrap_iters=0)
    return [sample["resps"] for sample in out["samples"][f"specpass_{kind}"]]


def test_answers_are_those_of_the_pruned_model(harness: Any) -> None:
    root, model = harness
    found = evaluate(root, model, "generate_until")
    for index, ((answer,),) in enumerate(found):
        ids = model.tokenizer(f"w{index} {TEXT}", return_tensors="pt").input_ids
        out = model.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False
        )
        assert answer == model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_continuations_are_scored_behind_the_pruned_context(harness: Any) -> None:
    root, model = harness
    found = evaluate(root, model, "multiple_choice")
    target, _ = eager_pair(root / "model")
    for index, choices in enumerate(found):
        ids = model.tokenizer(f"w{index} {TEXT}", return_tensors="pt").input_ids
        kept = eager.select(target, ids, BUDGET, how=eager.Scoring(window=WINDOW, reduce="mean", pool="avg")).positions
        for ((likely, _),), words in zip(choices, ("w5", "w7 w9 w11"), strict=True):
            told = model.tokenizer(words, return_tensors="pt").input_ids
            assert float(likely) == pytest.approx(by_the_formulas(target, ids, kept, told), abs=1e-3)


def eager_pair(folder: Path) -> Any:
    from specpass import hub

    return hub.load(folder)


@torch.no_grad()
def by_the_formulas(target: Any, ids: torch.Tensor, kept: Any, told: torch.Tensor) -> float:
    """Log-likelihood of tokens [1, n] behind a prompt [1, S] of which the cache keeps `kept`."""
    cache = DynamicCache()
    logits = target(input_ids=ids, past_key_values=cache).logits[:, -1:]
    eager.prune(cache, kept)
    if told.shape[1] > 1:
        positions = ids.shape[1] + torch.arange(told.shape[1] - 1)[None]
        rest = target(input_ids=told[:, :-1], position_ids=positions, past_key_values=cache).logits
        logits = torch.cat([logits, rest], 1)
    return float(logits.log_softmax(-1).gather(2, told[..., None]).sum())


def test_a_text_without_a_prompt_is_an_error(harness: Any) -> None:
    with pytest.raises(UnsupportedCallError, match=r"loglikelihood_rolling.*SnapKV"):
        harness[1].loglikelihood_rolling([])


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="it is installed")
def test_the_missing_harness_is_named() -> None:
    done = subprocess.run([sys.executable, "-m", "specpass.lm_eval"], capture_output=True, text=True, check=False)
    assert "pip install 'specpass[lm_eval]'" in done.stderr
