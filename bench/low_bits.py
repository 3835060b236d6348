"""A cache in 8, 4 and 2 bits beside the model's own dtype: bytes, scores at equal slots and at equal bytes, step time.

Lookups where every line is a needle (bench/needles.py). At equal slots each cache keeps C of each KV head; at equal
bytes each keeps as many as fit into what C slots take in the model's dtype, in whole groups. Beside the share of the
expected numbers stands how the cache agrees with full KV, whose own answer is fed token by token: the share of its
tokens that are the likeliest ones, and their mean negative log-likelihood. Bytes are those of the storages that a cache
holds once the prompt was read, less the free slots for the answer and what is counted and not quantised (positions),
beside the closed form (specpass/bits.py). A prompt is read once for each number of slots; copies of that cache are
quantised as its graph would have. Steps are timed by turns.

    python -m bench.low_bits
    python -m bench.low_bits --target qwen2.5-coder-1.5b --draft qwen2.5-coder-0.5b --tokens 8192 --budget 1024
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

from rich.progress import track

from bench import common, needles

BITS = (None, 8, 4, 2)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="qwen2.5-coder-0.5b", help="name or folder")
    parser.add_argument("--draft", default=None, help="name or folder: SpecKV; left out: SnapKV")
    parser.add_argument("--kind", choices=needles.KINDS, default="multikey")
    parser.add_argument("--tokens", type=int, default=1200)
    parser.add_argument("--budget", type=int, default=192, help="C in the model's dtype")
    parser.add_argument("--seeds", type=int, default=4, help="prompts 0 .. N-1")
    parser.add_argument("--new", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--steps", type=int, default=24, help="that are timed, of each cache")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="eager")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "low_bits.json")
    return parser.parse_args()


class Bench:
    """A model that is compiled for one method at a time, and full KV's answers."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.tokenizer = common.load_tokenizer(given.target)
        self.model = common.load_model(given.target, given.dtype).to(given.device)
        self.draft = None if given.draft is None else common.load_model(given.draft, given.dtype).to(given.device)

    @property
    def sizes(self) -> Any:
        """What the model's config says of its heads."""
        from specpass.sizes import Decoder

        found = Decoder.of(self.model.config, next(self.model.parameters()).element_size())
        if found is None:
            raise SystemExit(f"{self.given.target} is no dense decoder: its bytes have no closed form here.")
        return found

    def due(self, bits: int | None, slots: int) -> int:
        """Bytes of C slots of all layers by the closed form."""
        from specpass.bits import Layout

        sizes = self.sizes
        plain = 2 * slots * sizes.head_dim * sizes.itemsize
        own = plain if bits is None else Layout(bits, sizes.head_dim, sizes.head_dim, sizes.itemsize).head_bytes(slots)
        return sizes.layers * sizes.kv_heads * own

    def fitting(self, bits: int | None) -> int:
        """The most slots that take no more than the budget's in the model's dtype."""
        from specpass.bits import GROUP

        if bits is None:
            return self.given.budget
        allowed, slots = self.due(None, self.given.budget), GROUP
        while self.due(bits, slots + GROUP) <= allowed:
            slots += GROUP
        return slots

    def compile(self, slots: int) -> None:
        """Let C slots of each KV head be kept."""
        import specpass

        self.method = (specpass.SnapKV if self.draft is None else specpass.SpecKV)(budget=slots)
        specpass.compile(self.model, draft=self.draft, method=self.method, lowering=self.given.lowering)

    def read(self, ids: Any) -> tuple[Any, Any, float]:
        """A pruned prompt: (logits [V] behind it, the cache in the model's dtype, seconds)."""
        import torch

        import specpass

        cache = specpass.BudgetCache(self.model.config, self.method, max_new_tokens=2 * self.given.new)
        since = time.perf_counter()
        with torch.no_grad():
            out = self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        return out.logits[0, -1].float(), cache, time.perf_counter() - since

    def step(self, token: int, cache: Any) -> Any:
        import torch

        ids = torch.tensor([[token]], device=self.given.device)
        with torch.no_grad():
            return self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[0, -1].float()

    def answer(self, logits: Any, cache: Any, fed: list[int] | None = None) -> tuple[list[int], list[Any]]:
        """Greedy tokens up to an EOS, or those that are `fed`; and the logits in front of each."""
        from specpass.sizes import eos_ids

        ends, tokens, seen = eos_ids(self.model.generation_config), [], []
        for index in range(self.given.new if fed is None else len(fed)):
            tokens.append(int(logits.argmax()) if fed is None else fed[index])
            seen.append(logits)
            if fed is None and tokens[-1] in ends:
                break
            logits = self.step(tokens[-1], cache)
        return tokens, seen

    def full(self, ids: Any) -> list[int]:
        """The answer of full KV."""
        out = self.model.generate(
            input_ids=ids, max_new_tokens=self.given.new, do_sample=False, repetition_penalty=1.0, pad_token_id=0
        )
        return out[0, ids.shape[1] :].tolist()

    def score(self, tokens: list[int], prompt: Any) -> float:
        return needles.score(self.tokenizer.decode(tokens, skip_special_tokens=True), prompt.answers)

    def run(self, prompt: Any, equal: str, bits: int | None, read: Any, due: list[int]) -> dict[str, Any]:
        """One prompt with one cache. Args: read: what `read` returned, which is left as it is."""
        import torch

        logits, cache, seconds = read[0], quantized(read[1], bits), read[2]
        slots, measured = cache.method.budget, held(cache)
        _, seen = self.answer(logits, cache, due)
        cache.crop(len(due))
        tokens, _ = self.answer(logits, cache)
        rows, wanted = torch.stack(seen), torch.tensor(due, device=self.given.device)
        return {
            "seed": prompt.seed,
            "equal": equal,
            "bits": bits or 8 * self.sizes.itemsize,
            "slots": slots,
            "bytes": measured,
            "bytes_due": self.due(bits, slots),
            "score": self.score(tokens, prompt),
            "agrees": float((rows.argmax(-1) == wanted).float().mean()),
            "nll": float(torch.nn.functional.cross_entropy(rows, wanted)),
            "answer": self.tokenizer.decode(tokens, skip_special_tokens=True),
            "prefill_s": round(seconds, 2),
        }

    def times(self, ids: Any) -> list[dict[str, Any]]:
        """Milliseconds of a step at equal slots, the caches by turns; the first three of each warm up."""
        import torch

        import specpass

        caches = {}
        for bits in BITS:
            caches[bits] = specpass.BudgetCache(
                self.model.config, self.method, max_new_tokens=self.given.steps, cache_bits=bits
            )
            with torch.no_grad():
                self.model(input_ids=ids, past_key_values=caches[bits], logits_to_keep=1)
        found: dict[int | None, list[float]] = {bits: [] for bits in BITS}
        for _ in range(self.given.steps):
            for bits, cache in caches.items():
                since = time.perf_counter()
                self.step(100, cache)
                if self.given.device != "cpu":
                    torch.cuda.synchronize()
                found[bits].append(1000 * (time.perf_counter() - since))
        return [
            {
                "bits": bits or 8 * self.sizes.itemsize,
                "slots": self.given.budget,
                "step_ms": common.median(own[3:], 2),
                "ratio": common.median([a / b for a, b in zip(own[3:], found[None][3:], strict=True)], 3),
            }
            for bits, own in found.items()
        ]


def quantized(cache: Any, bits: int | None) -> Any:
    """A copy of a cache that has read its prompt, in so many bits."""
    found = copy.deepcopy(cache)
    found.bits = bits or 0
    for layer in found.budgeted if bits else ():
        layer.bits = bits
        layer.quantize(layer.budget)
    return found


def held(cache: Any) -> int:
    """Bytes of the prompt's slots, by the storages that the cache holds."""
    from specpass.observe.storage import cache_bytes

    other = 0
    for layer in cache.budgeted:
        behind = layer.key_buffer, layer.value_buffer
        numbers = layer.batch_size * layer.kv_heads * cache.room * sum(each.shape[2] for each in behind)
        other += numbers * layer.key_buffer.element_size()
        counts = () if layer.quantized is None else (layer.counts,)
        other += sum(each.untyped_storage().nbytes() for each in (layer.kept_positions, layer.lengths, *counts))
    own = [each for each in vars(cache).values() if hasattr(each, "untyped_storage")]
    return cache_bytes(cache) - other - sum(each.untyped_storage().nbytes() for each in own)


def summary(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over prompts of each cache."""
    rows = []
    for key in dict.fromkeys((each["equal"], each["bits"], each["slots"]) for each in records):
        own = [each for each in records if (each["equal"], each["bits"], each["slots"]) == key]
        means = {name: round(statistics.mean(each[name] for each in own), 3) for name in ("score", "agrees", "nll")}
        sizes = {"bytes": own[0]["bytes"], "bytes_over_formula": round(own[0]["bytes"] / own[0]["bytes_due"], 4)}
        rows.append({"equal": key[0], "bits": key[1], "slots": key[2], "prompts": len(own), **sizes, **means})
    return rows


def main() -> None:
    given = arguments()
    import torch

    bench = Bench(given)
    settings = {name: value for name, value in vars(given).items() if name != "out"}
    prompts = [needles.make_prompt(given.kind, seed, given.tokens, bench.tokenizer) for seed in range(given.seeds)]
    ids = [torch.tensor([prompt.ids], device=given.device) for prompt in prompts]
    answers = [bench.full(own) for own in track(ids, description="full KV")]
    full = statistics.mean(map(bench.score, answers, prompts))
    records: list[dict[str, Any]] = []
    times: list[dict[str, Any]] = []
    fitting = {bits: bench.fitting(bits) for bits in BITS}
    for slots in dict.fromkeys(fitting.values()):
        bench.compile(slots)
        times = times or bench.times(ids[0])
        for prompt, own, answer in track(list(zip(prompts, ids, answers, strict=True)), description=f"{slots} slots"):
            read = bench.read(own)
            for equal, bits in asked(slots, fitting):
                records.append(bench.run(prompt, equal, bits, read, answer))
        parts = {"full_score": full, "summary": summary(records), "steps": times, "records": records}
        common.save_results(given.out, settings, **parts)


def asked(slots: int, fitting: dict[int | None, int]) -> list[tuple[str, int | None]]:
    """What is run with so many slots: at equal slots all caches, at equal bytes those whose slots these are."""
    equal = [("slots", bits) for bits in BITS if slots == fitting[None]]
    return equal + [("bytes", bits) for bits, most in fitting.items() if most == slots]


if __name__ == "__main__":
    main()
