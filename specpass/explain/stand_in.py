"""What specpass does with a pair of models, found out without their weights.

A stand-in has the target's class, layers, heads and layer types, but narrow layers and random weights: passes match
structure, so it is rewritten, or refused, as the model is. Where no stand-in can be made, the model is loaded.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

import specpass
from specpass import hub
from specpass.backend import checks
from specpass.graph.edit import copy_module
from specpass.methods.base import Method
from specpass.passes.pipeline import PASSES
from specpass.reports.report import Report
from specpass.rewrite import Observer, Request
from specpass.sizes import Decoder

HEAD_DIM, INTERMEDIATE, VOCAB = 16, 64, 256
KEPT = {"traced": "TRACED", PASSES[-1].name: "PRUNED"}  # the graph in front of the passes, and behind them
BEYOND = 64  # prompt tokens beyond the budget
RATIO_PROMPT = 1024  # the prompt of a budget that is a ratio: any draft can read it


def narrow(config: Any) -> Any:
    """A copy of a text model's config with the same layers and heads and little of everything else."""
    small = copy.deepcopy(config)
    small.vocab_size, small.hidden_size = VOCAB, HEAD_DIM * small.num_attention_heads
    for name in ("intermediate_size", "ffn_dim", "n_inner", "moe_intermediate_size"):
        if isinstance(getattr(small, name, None), int):
            setattr(small, name, INTERMEDIATE)
    if isinstance(getattr(small, "head_dim", None), int):
        small.head_dim = HEAD_DIM
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(small, name, None)
    small._name_or_path = ""  # its tokenizer is nobody's
    return small


def stand_in(config: Any, dtype: torch.dtype) -> Any:
    """A random model of the narrow config, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(narrow(config), dtype=dtype)
    return model.eval().requires_grad_(False)


def explain(
    target: str,
    draft: str | None,
    method: Method,
    *,
    dtype: str = "auto",
    lowering: str = "inductor",
    max_new_tokens: int = 256,
    weights: bool = False,
    trust_remote_code: bool = False,
) -> tuple[Report, dict[str, fx.GraphModule]]:
    """Compile a stand-in of the pair (or, with `weights`, the models), and run one prompt and two decode steps.

    Returns: the report, with the costs of the real models, and the prefill's graph as it came from tracing ("TRACED")
    and rewritten ("PRUNED"); the latter is missing where the model was refused.

    Raises: what `hub.model_path`, `specpass.compile` and a call of the compiled model raise.
    """
    configs = [
        None if name is None else hub.read_config(name, trust_remote_code=trust_remote_code) for name in (target, draft)
    ]
    if configs[1] is not None:
        checks.check_tokenizers(*configs)
    model = _model(target, configs[0], dtype, weights, trust_remote_code)
    small = None if draft is None else _model(draft, configs[1], dtype, weights, trust_remote_code)
    stages: dict[str, fx.GraphModule] = {}
    specpass.compile(model, draft=small, method=method, lowering=lowering, observe=keeper(stages))
    size = method.budget + BEYOND if isinstance(method.budget, int) else RATIO_PROMPT
    cache = specpass.BudgetCache(model.config, method, max_new_tokens=max_new_tokens, prompt_length=size)
    vocab = min(m.config.get_text_config(decoder=True).vocab_size for m in (model, small) if m is not None)
    ids = torch.randint(1, vocab, (1, size), generator=torch.Generator().manual_seed(0))
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=3, do_sample=False
    )
    report = specpass.report(model)
    report.kept = report.whole = None  # of a random prompt, which tells nothing, and of a stand-in's sizes
    decoders = [None if config is None else Decoder.of(config, dtype_of(config, dtype).itemsize) for config in configs]
    report.decoders = (decoders[0], decoders[1])
    return report, stages


def keeper(found: dict[str, fx.GraphModule]) -> Observer:
    """Keeps copies of the prefill's graph from before the first pass and from behind the last."""

    def keep(request: Request, name: str, gm: fx.GraphModule) -> None:
        if request.model == "target" and request.kind == "prefill" and name in KEPT:
            found[KEPT[name]] = copy_module(gm)

    return keep


def _model(name: str, config: Any, dtype: str, weights: bool, trust: bool) -> Any:
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING  # else its class lies in the model's folder
    if not weights and known and config.get_text_config(decoder=True) is config:
        try:
            return stand_in(config, dtype_of(config, dtype))
        except (ValueError, RuntimeError, TypeError, KeyError, AttributeError):
            pass  # a config whose numbers hang together in its own way: only the model itself will do
    return hub.load(name, dtype, trust_remote_code=trust)[0].requires_grad_(False)


def dtype_of(config: Any, dtype: str) -> torch.dtype:
    """What a model of this config is loaded in; `dtype` "auto": as it is stored."""
    found = config.dtype if dtype == "auto" else dtype
    if found is None:
        return torch.float32
    return getattr(torch, found) if isinstance(found, str) else found
