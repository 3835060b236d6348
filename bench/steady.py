"""A compiled model that serves for long: graphs and memory stay as they are after the first few prompts.

300 prompts of random lengths and options go through one compiled pair: batches, padding, beams, sampling, second
turns, answers of many lengths, prompts that fit the budget. After the tenth there must be no new graph. Then pairs are
compiled, restored and deleted in the same process, and every weight must be freed.

    python -m bench.steady
"""

from __future__ import annotations

import argparse
import gc
import random
import weakref
from pathlib import Path
from typing import Any

from rich.progress import track

from bench import common
from bench.memory import status
from specpass.benchmarks.results import machine, versions, write_json

FIRST = 10  # prompts that may bring graphs: one of each form
LENGTHS = (70, 900)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=common.RESULTS / "steady.json")
    return parser.parse_args()


def tiny(layers: int, seed: int) -> Any:
    """A random Llama: what is measured does not depend on size."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.25,
    )
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def compiled_pair(lowering: str) -> tuple[Any, Any]:
    import specpass

    target, draft = tiny(3, 0), tiny(2, 1)
    method = specpass.SpecKV(budget=64, window=8)
    return specpass.compile(target, draft=draft, method=method, lowering=lowering), draft


def serve(model: Any, index: int, choice: random.Random) -> None:
    """One prompt; the first FIRST are one of each form, the others random."""
    import torch

    forms = [(batch, padded, fits) for fits in (False, True) for batch, padded in ((1, False), (2, False), (3, True))]
    batch, padded, fits = forms[index] if index < len(forms) else choice.choice(forms)
    length = choice.randint(2, 64) if fits else choice.randint(*LENGTHS)
    ids = torch.randint(1, 128, (batch, length), generator=torch.Generator().manual_seed(index))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, : choice.randint(1, max(1, length // 2))] = 0
    sampled: dict[str, Any] = {"do_sample": True, "num_return_sequences": 2}
    options = choice.choice(({"num_beams": 2}, {"do_sample": True}, {"do_sample": False}, sampled))
    if index < len(forms):  # each form as it is: beams and returned sequences make several rows of one
        options = {}
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=choice.randint(33, 90), return_dict_in_generate=True, **options
    )
    if (index < len(forms) or index % 3 == 0) and "num_beams" not in options:  # a second turn
        rows = out.sequences.shape[0]
        new = torch.randint(1, 128, (rows, choice.randint(2, 30)))
        turn = torch.cat([out.sequences, new], 1)
        # Given, not left to generate(), which takes an answer's zeros for padding.
        seen = torch.ones_like(turn)
        seen[:, :length] = mask.repeat_interleave(rows // batch, 0)
        model.generate(
            turn, attention_mask=seen, past_key_values=out.past_key_values, max_new_tokens=choice.randint(2, 9)
        )


def steady(settings: argparse.Namespace) -> dict[str, Any]:
    """Graphs and resident memory after each prompt."""
    import specpass

    model, _ = compiled_pair(settings.lowering)
    choice = random.Random(settings.seed)
    graphs, resident = [], []
    for index in track(range(settings.prompts), "prompts"):
        serve(model, index, choice)
        graphs.append(len(specpass.report(model).graphs))
        if index % 10 == 9:
            gc.collect()
        resident.append(status("VmRSS"))
    half = resident[settings.prompts // 2 :]
    return {
        "prompts": settings.prompts,
        "graphs_after_the_tenth": graphs[FIRST - 1],
        "graphs_at_the_end": graphs[-1],
        "resident_mib": {
            "after_the_tenth": resident[FIRST - 1] >> 20,
            "at_half": resident[settings.prompts // 2] >> 20,
            "at_the_end": resident[-1] >> 20,
            "growth_of_the_second_half": (half[-1] - half[0]) / 2**20,
        },
    }


def freed(settings: argparse.Namespace) -> dict[str, int]:
    """Pairs compiled, used, restored and deleted: how many targets and drafts are still alive."""
    import torch

    import specpass

    alive = []
    for index in track(range(settings.pairs), "pairs"):
        model, draft = compiled_pair("eager")
        alive += [weakref.ref(model), weakref.ref(draft)]
        model.generate(torch.randint(1, 128, (1, 90)), max_new_tokens=2 + index % 3)
        specpass.restore(model)
        del model, draft
        gc.collect()
    return {"pairs": settings.pairs, "models_alive": sum(one() is not None for one in alive)}


def main() -> None:
    settings = arguments()
    document = {
        "machine": machine(),
        "versions": versions(),
        "settings": {"lowering": settings.lowering, "seed": settings.seed},
        "results": {"steady": steady(settings), "freed": freed(settings)},
    }
    write_json(settings.out, document)
    print(document["results"])


if __name__ == "__main__":
    main()
