"""Three turns that ask about three places of one document: full KV, a pruned cache, and one that holds what it drops.

Every line of the document is a needle, and each turn asks for one of another third. A conversation goes on with its own
answers, and one cache serves its three turns; `dropped="host"` chooses among all of it at each. No lookahead is
verified: full KV's own logits would answer in the slots' place. Records are written one by one, and a rerun goes on
where it stopped.

    python -m bench.turns                                                      # the Qwen pair, 8k tokens, 16 seeds
    python -m bench.turns --target qwen2.5-coder-0.5b --draft qwen2.5-coder-0.5b --tokens 1200 --budget 128 --seeds 6
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import common, needles
from specpass.benchmarks.tasks.vocabulary import ADJECTIVES, NOUNS

TURNS = 3
WAYS = ("full", "dropped", "host")  # full KV; what is dropped is gone; what is dropped is held
MARK = "@@@"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="qwen2.5-coder-1.5b", help="name or folder")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b", help="name or folder")
    parser.add_argument("--method", choices=("speckv", "snapkv"), default="speckv")
    parser.add_argument("--tokens", type=int, default=8192, help="of the first prompt")
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--lookahead", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=16, help="seeds 0 .. N-1")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--restart", action="store_true", help="drop stored records")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "turns.json")
    return parser.parse_args()


def drawn(seed: int, lines: int) -> tuple[str, list[str], list[str]]:
    """A document of so many lines, and of each turn the question and the number that answers it."""
    dice = random.Random(f"turns-{seed}")
    keys = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]
    dice.shuffle(keys)
    numbers = [str(number) for number in dice.sample(range(1_000_000, 10_000_000), len(keys))]
    depths = [(third + dice.random()) / TURNS for third in dice.sample(range(TURNS), TURNS)]
    asked = [int(depth * lines) for depth in depths]
    pairs = list(zip(keys, numbers, strict=True))[:lines]
    body = "\n".join(f"One of the special magic numbers for {key} is: {number}." for key, number in pairs)
    question = "What is the special magic number for {} mentioned in the text above? Answer with the number only."
    return f"{needles.INTRO}\n\n{body}", [question.format(keys[at]) for at in asked], [numbers[at] for at in asked]


def rendered(tokenizer: Any, messages: list[str]) -> str:
    """User's and assistant's messages in turn, and the assistant's beginning behind them."""
    roles = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(messages)]
    return tokenizer.apply_chat_template(roles, add_generation_prompt=True, tokenize=False)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_of(tokenizer: Any, seed: int, tokens: int) -> tuple[list[int], list[str], list[str]]:
    """The first prompt's ids, as many lines as fit in `tokens`, with questions and answers."""

    def at(lines: int) -> list[int]:
        document, questions, _ = drawn(seed, lines)
        return ids_of(tokenizer, rendered(tokenizer, [f"{document}\n\n{questions[0]}"]))

    low, high = TURNS, 2 * TURNS
    while len(at(high)) <= tokens:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(at(middle)) <= tokens else (low, middle)
    return at(low), *drawn(seed, low)[1:]


def turn_of(tokenizer: Any, question: str, ended: bool) -> list[int]:
    """What comes behind an answer, which has `ended` with its end-of-sequence token or was cut off."""
    piece = rendered(tokenizer, ["-", MARK, question]).split(MARK)[1]
    return ids_of(tokenizer, piece.removeprefix(tokenizer.eos_token) if ended else piece)


def conversation(model: Any, tokenizer: Any, seed: int, given: argparse.Namespace, **options: Any) -> dict[str, Any]:
    """Three turns with one cache: answers, what each is worth, and seconds of each."""
    import torch

    from specpass.observe.storage import cache_bytes

    ids, questions, expected = prompt_of(tokenizer, seed, given.tokens)
    first, answers, tokens, seconds = len(ids), [], [], []
    for turn in range(TURNS):
        since = time.perf_counter()
        asked = torch.tensor([ids], device=given.device)
        out = model.generate(
            input_ids=asked,
            attention_mask=torch.ones_like(asked),
            max_new_tokens=given.new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            return_dict_in_generate=True,
            **options,
        )
        seconds.append(round(time.perf_counter() - since, 2))
        options["past_key_values"] = cache = out.past_key_values
        tokens.append(out.sequences[0, len(ids) :].tolist())
        answers.append(tokenizer.decode(tokens[-1], skip_special_tokens=True))
        ids = out.sequences[0].tolist()
        if turn + 1 < TURNS:
            ids += turn_of(tokenizer, questions[turn + 1], ended=ids[-1] == tokenizer.eos_token_id)
    scores = [needles.score(answer, [number]) for answer, number in zip(answers, expected, strict=True)]
    return {
        "prompt_tokens": first,
        "expected": expected,
        "answers": answers,
        "scores": scores,
        "tokens": tokens,
        "seconds": seconds,
        "cache_bytes": cache_bytes(cache),
        "host_bytes": getattr(cache, "host_bytes", 0),
    }


def summarise(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """By way and turn: the mean score, and how many answers are full KV's, token for token."""
    listed = list(records)
    full = {record["seed"]: record["tokens"] for record in listed if record["method"] == "full"}
    found: dict[str, Any] = {}
    for way in WAYS:
        own = [record for record in listed if record["method"] == way]
        if own:
            found[way] = {
                "conversations": len(own),
                "score": [round(sum(record["scores"][turn] for record in own) / len(own), 4) for turn in range(TURNS)],
                "as_full": [
                    sum(record["tokens"][turn] == full.get(record["seed"], [None] * TURNS)[turn] for record in own)
                    for turn in range(TURNS)
                ],
                "seconds": [common.median((record["seconds"][turn] for record in own), 2) for turn in range(TURNS)],
                "cache_bytes": own[0]["cache_bytes"],
                "host_bytes": own[0]["host_bytes"],
            }
    return found


def method_of(given: argparse.Namespace) -> Any:
    import specpass

    if given.method == "snapkv":
        return specpass.SnapKV(budget=given.budget, window=given.window)
    return specpass.SpecKV(budget=given.budget, window=given.window, lookahead=given.lookahead, verify=False)


def show(summary: dict[str, Any]) -> None:
    columns = [f"turn {turn + 1}" for turn in range(TURNS)]
    table = Table("cache", *columns, "seconds", "cache MiB", "host MiB", title="share answered right (as full KV)")
    for way, entry in summary.items():
        pairs = zip(entry["score"], entry["as_full"], strict=True)
        cells = [f"{score:.3f} ({alike} of {entry['conversations']})" for score, alike in pairs]
        sizes = [f"{entry[name] / 2**20:,.1f}" for name in ("cache_bytes", "host_bytes")]
        table.add_row(way, *cells, " ".join(map(str, entry["seconds"])), *sizes)
    Console().print(table)


def main() -> None:
    given = arguments()
    import specpass

    names = ("method", "tokens", "budget", "window", "lookahead", "new_tokens", "dtype", "device", "lowering")
    settings = {name: getattr(given, name) for name in names}
    settings |= {"target": Path(given.target).name, "draft": Path(given.draft).name}
    store = common.Store(given.out, settings, given.restart, summarise)
    tokenizer = common.load_tokenizer(given.target)
    target = common.load_model(given.target, given.dtype).to(given.device)
    method, draft = method_of(given), None
    if method.needs_draft:
        draft = common.load_model(given.draft, given.dtype).to(given.device)
    for way in WAYS:
        seeds = [seed for seed in range(given.seeds) if (way, seed) not in store]
        if seeds and way != "full":
            specpass.compile(
                target, draft=draft, method=method, lowering=given.lowering, dropped="host" if way == "host" else None
            )
        for seed in track(seeds, way):
            store.put(way, seed, **conversation(target, tokenizer, seed, given))
        specpass.restore(target)
    store.save()
    show(store.parts["summary"])


if __name__ == "__main__":
    main()
