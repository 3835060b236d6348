"""Generate from an exported folder with numpy and ONNX Runtime; nothing here needs torch or transformers.

    model = specpass.runtime.load("folder")
    model.generate([[1, 2, 3], [4, 5]], max_new_tokens=64)      # one list of new tokens per prompt

The cache is one buffer [B, K, slots, D] per layer for keys and one for values, bound as input and as output of each
decode step: a step writes its own slot and copies nothing else.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specpass.errors import BundleError, DraftContextError, OnnxMissingError, PromptError
from specpass.runtime.bundle import DECODE, PREFILL, Bundle, read_bundle
from specpass.runtime.replay import LOOKAHEAD_LOGITS, Replay
from specpass.runtime.sampling import Sampler, Sampling

ROOM_STEP = 64  # slots for generated tokens come in blocks of this many, as in the compiled cache


def load(folder: str | Path, *, threads: int | None = None, verify: bool = False) -> Runtime:
    """Open what `specpass export` wrote.

    Args:
        threads: of ONNX Runtime; None is one a core that this process may use.
        verify: compare the SHA-256 of every file too, not only its size.

    Raises: BundleError, OnnxMissingError.
    """
    bundle = read_bundle(folder, full=verify)
    return Runtime(Path(folder), bundle, threads or len(os.sched_getaffinity(0)))


@dataclasses.dataclass
class State:
    """A batch after its prefill.

    Attributes:
        logits: [B, V] of the last position.
        positions: per layer [B, K, M] kept prompt positions, unused slots -1; M is the layer's entry in the folder's
            budgets.
        lengths: [layers, B, K] slots in use.
        told: [B] position of the next token, as the target counts.
        storage: `past.0.key`, ... [B, K, slots, D], as OrtValues; arrays: the same memory, for numpy.
        lookahead_ids: [B, L] or None.
        prompt_positions: [B, C] or None.
        replay: while the answer may be the lookahead.
        free_tokens: tokens whose step was not computed: the answer followed the lookahead.
    """

    logits: np.ndarray
    positions: list[np.ndarray]
    lengths: np.ndarray
    told: np.ndarray
    storage: dict[str, Any]
    arrays: dict[str, np.ndarray]
    lookahead_ids: np.ndarray | None
    prompt_positions: np.ndarray | None
    itemsize: int
    replay: Replay | None = None
    free_tokens: int = 0

    @property
    def cache_bytes(self) -> int:
        """Bytes of the K and V buffers."""
        return sum(math.prod(value.shape()) * self.itemsize for value in self.storage.values())


class Runtime:
    """Prefill and decode sessions of one export; made by `load`."""

    def __init__(self, folder: Path, bundle: Bundle, threads: int) -> None:
        self.folder, self.bundle = folder, bundle
        self._ort = _onnxruntime()
        self._decode = self._session(DECODE, threads)
        self._prefill = self._session(PREFILL, threads)
        self._outputs = [output.name for output in self._prefill.get_outputs()]
        self.state: State | None = None

    def _session(self, name: str, threads: int) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Packed copies of the weights would stand beside the mapped file, once for each session.
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            return self._ort.InferenceSession(str(self.folder / name), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own classes are no API
            raise BundleError(
                f"{self.folder / name} does not load in ONNX Runtime ({error}): export the model again, "
                "or install the onnxruntime that specpass.json names."
            ) from error

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 256,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float | None = None,
        seed: int = 0,
        stop_tokens: Iterable[int] | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """New tokens of each prompt, its stop token included.

        Args:
            prompts: token ids, one list a prompt; rows of unequal length are padded on the left.
            repetition_penalty: None is the target's own, as in generate.
            stop_tokens: None is the target's EOS ids.
            on_token: called as on_token(row, token) with each new token.

        Raises: PromptError, SamplingError, DraftContextError.
        """
        found: list[list[int]] = [[] for _ in prompts]
        for row, token in self.stream(
            prompts,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop_tokens=stop_tokens,
        ):
            found[row].append(token)
            if on_token is not None:
                on_token(row, token)
        return found

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 256,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float | None = None,
        seed: int = 0,
        stop_tokens: Iterable[int] | None = None,
    ) -> Iterator[tuple[int, int]]:
        """(row, token) as they come; arguments as in `generate`."""
        penalty = self.bundle.repetition_penalty if repetition_penalty is None else repetition_penalty
        sampler = Sampler(Sampling(temperature, top_k, top_p, penalty, seed))
        stops = set(self.bundle.eos_ids if stop_tokens is None else stop_tokens)
        if max_new_tokens < 1:
            raise PromptError(f"max_new_tokens={max_new_tokens}: expected at least 1.")
        state = self.state = self.prefill(prompts, max_new_tokens)
        seen = [list(prompt) for prompt in prompts]
        ended = np.zeros(len(prompts), dtype=bool)
        for index in range(max_new_tokens):
            tokens = sampler(state.logits, seen)
            for row in np.flatnonzero(~ended):
                token = int(tokens[row])
                seen[row].append(token)
                ended[row] = token in stops
                yield int(row), token
            if ended.all() or index == max_new_tokens - 1:
                return
            self.step(state, np.where(ended, self.bundle.pad_id, tokens))

    def prefill(self, prompts: Sequence[Sequence[int]], room: int = 1) -> State:
        """Read the prompts, prune, and make room for `room` new tokens (in blocks of 64 slots)."""
        ids, mask = self._pad(prompts)
        out = dict(zip(self._outputs, self._prefill.run(None, {"input_ids": ids, "attention_mask": mask}), strict=True))
        ahead = out.pop(LOOKAHEAD_LOGITS, None)
        waiting = (
            0 if ahead is None else ahead.shape[1]
        )  # of the free slots, those with the lookahead's keys and values
        free = -(-max(room, waiting) // ROOM_STEP) * ROOM_STEP
        positions = [out[f"positions.{layer}"] for layer in range(len(self.bundle.kv))]
        told = mask.sum(1) - out.get("shift", np.zeros(len(ids), np.int64))
        most = max(heads for heads, _, _ in self.bundle.kv)
        lengths = np.zeros((len(positions), len(ids), most), np.int64)
        for layer, own in enumerate(positions):
            lengths[layer, :, : own.shape[1]] = (own >= 0).sum(-1)
        used = slots_used(positions, lengths)
        arrays = {}
        for name in [name for name in out if name.startswith("present.")]:
            states, size = out.pop(name), used[_layer_of(name)]
            batch, heads, _, dim = states.shape
            buffer = np.zeros((batch, heads, size + free, dim), states.dtype)
            buffer[:, :, :size] = states[:, :, :size]
            arrays[name.replace("present", "past", 1)] = buffer
        for name in [name for name in out if name.startswith("lookahead.")]:
            states = out.pop(name)
            place = self._next_slots(lengths, name, np.ones(len(ids), dtype=bool), waiting)
            arrays[name.replace("lookahead", "past", 1)][place] = states
        return State(
            out["logits"][:, -1],
            positions,
            lengths,
            told,
            {name: self._ort.OrtValue.ortvalue_from_numpy(buffer) for name, buffer in arrays.items()},
            arrays,
            out.get("lookahead_ids"),
            out.get("prompt_positions"),
            np.dtype(self.bundle.dtype).itemsize,
            None if ahead is None else Replay.of(out["lookahead_ids"], ahead),
        )

    def _pad(self, prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        if not len(prompts) or any(not len(prompt) for prompt in prompts):
            raise PromptError("a prompt is empty: give at least one token id a prompt, and at least one prompt.")
        size = max(len(prompt) for prompt in prompts)
        context, lookahead = self.bundle.context, self.bundle.lookahead
        if context is not None and size + lookahead > context:
            raise DraftContextError(
                f"the prompt has {size} tokens and the draft writes {lookahead} more, but the draft reads at most "
                f"{context}: shorten the prompt, or export with a lower lookahead."
            )
        ids = np.full((len(prompts), size), self.bundle.pad_id, np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            own = np.asarray(prompt)
            if own.dtype.kind not in "iu" or own.ndim != 1 or own.min() < 0 or own.max() >= self.bundle.vocab:
                raise PromptError(f"prompt {row} is no list of token ids from 0 to {self.bundle.vocab - 1}.")
            ids[row, size - len(own) :] = own
            mask[row, size - len(own) :] = 1
        return ids, mask

    def step(self, state: State, tokens: np.ndarray) -> None:
        """One decode step on tokens [B]: the cache is written in place, `state.logits` are the new ones [B, V]."""
        for name, value in state.storage.items():
            slots = value.shape()[2]
            if state.lengths[_layer_of(name)].max() >= slots:
                raise PromptError(f"the cache's {slots} slots are full: call prefill with a larger room.")
        follows = np.zeros(len(tokens), dtype=bool)
        known = state.logits
        if state.replay is not None:
            follows, known = state.replay.take(tokens), state.replay.known
            state.free_tokens += int(follows.sum())
            if state.replay.over:
                state.replay = None
        if follows.all():
            state.logits = known
        else:
            places = {name: self._next_slots(state.lengths, name, follows) for name in state.arrays if follows.any()}
            held = {name: state.arrays[name][place] for name, place in places.items()}
            self._compute(state, tokens)
            for name, place in places.items():  # the lookahead's keys and values, computed with all KV
                state.arrays[name][place] = held[name]
            state.logits = np.where(follows[:, None], known, state.logits)
        state.lengths += 1
        state.told = state.told + 1

    def _next_slots(self, lengths: np.ndarray, name: str, rows: np.ndarray, count: int = 1) -> tuple[np.ndarray, ...]:
        """Index of the next `count` free slots of each KV head of a layer's buffer `past.LAYER.key`, of rows [B]."""
        layer = _layer_of(name)
        chosen = np.flatnonzero(rows)[:, None, None]
        heads = np.arange(self.bundle.kv[layer][0])[None, :, None]
        return chosen, heads, lengths[layer][chosen, heads] + np.arange(count)

    def _compute(self, state: State, tokens: np.ndarray) -> None:
        """The decode graph, on all rows."""
        binding = self._decode.io_binding()
        for name, array in (
            ("input_ids", tokens[:, None]),
            ("position_ids", state.told[:, None]),
            ("lengths", state.lengths),
        ):
            binding.bind_cpu_input(name, np.ascontiguousarray(array, dtype=np.int64))
        for name, value in state.storage.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past", "present", 1), value)
        binding.bind_output("logits", "cpu")
        self._decode.run_with_iobinding(binding)
        state.logits = binding.get_outputs()[-1].numpy()[:, -1]


def slots_used(positions: Sequence[np.ndarray], lengths: np.ndarray) -> list[int]:
    """Of each layer the slots in use of its longest head, or of one in a layer with as many slots: these stay alike.

    Fewer than its positions [B, K, M] have where heads have budgets of their own, or prompts are short.

    Args: lengths [layers, B, K].
    """
    sizes = [own.shape[2] for own in positions]
    longest = dict.fromkeys(sizes, 0)
    for size, own in zip(sizes, lengths, strict=True):
        longest[size] = max(longest[size], int(own.max()))
    return [longest[size] for size in sizes]


def _layer_of(name: str) -> int:
    """The layer of `present.LAYER.key`."""
    return int(name.split(".")[1])


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise OnnxMissingError(
            "an exported model runs in ONNX Runtime, which is not installed: pip install onnxruntime"
        ) from None
    return onnxruntime
