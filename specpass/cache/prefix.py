"""Prefix: the keys and values of a document that was read once, for questions that come behind it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path

import torch
from torch import Tensor

from specpass.cache.identity import Identity
from specpass.errors import PrefixDraftError, PrefixDtypeError, PrefixModelError

Pair = tuple[Tensor, Tensor]  # keys [1, K, P, D] and values [1, K, P, Dv]


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix:
    """All keys and values that a target, and its draft, have of the same P tokens. Made by `specpass.read`.

    Nothing changes it: any number of questions, and batches of them, go on from one prefix. It lies where it was put
    (on the device, in host memory, in a file that is mapped): a question moves a layer at a time to its model's device.

    Attributes:
        ids: token ids of the document, int64 [P].
        layers: by the number of each layer of the target that holds keys and values: keys [1, K, P, D], values.
        draft: the same of each layer of the draft that does, in order; None where no draft has read the document.
        target, drafter: which models read it.
    """

    ids: Tensor
    layers: dict[int, Pair]
    draft: list[Pair] | None
    target: Identity
    drafter: Identity | None

    def __len__(self) -> int:
        """P tokens."""
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(states.nbytes for pair in self.pairs for states in pair)

    @property
    def pairs(self) -> list[Pair]:
        """Keys and values of the target's layers and of the draft's."""
        return [*self.layers.values(), *(self.draft or ())]

    @property
    def device(self) -> torch.device:
        """Where the keys and values lie."""
        return self.pairs[0][0].device

    @functools.cached_property
    def key(self) -> str:
        """Text that differs between documents and between models."""
        digest = hashlib.sha256(self.ids.numpy().tobytes())
        digest.update(repr((self.target, self.drafter)).encode())
        return digest.hexdigest()

    def to(self, device: str | torch.device) -> Prefix:
        """The same on another device: "cpu" is host memory."""

        def moved(pair: Pair) -> Pair:
            return pair[0].to(device), pair[1].to(device)

        draft = None if self.draft is None else [moved(pair) for pair in self.draft]
        return dataclasses.replace(
            self, layers={index: moved(pair) for index, pair in self.layers.items()}, draft=draft
        )

    def __deepcopy__(self, memo: dict) -> Prefix:
        return self  # nothing changes it

    def save(self, path: str | Path) -> None:
        """Write a file of safetensors, which appears whole or not at all.

        Raises: OutputFileError: it cannot be written there.
        """
        from specpass.cache.prefix_file import save

        save(self, Path(path))

    @staticmethod
    def load(path: str | Path, device: str | torch.device = "cpu") -> Prefix:
        """A prefix that `save` has written, in this process or another.

        Args:
            path: of the file. It is mapped into memory: what a question reads is read from the disk, a layer at a time,
                and stays in the system's cache.
            device: where keys and values are to lie; "cpu": where the file is mapped.

        Raises: PrefixFileError: no file, none of a prefix, or a part of one. PrefixVersionError: of another version.
        """
        from specpass.cache.prefix_file import load

        prefix = load(Path(path))
        return prefix if torch.device(device).type == "cpu" else prefix.to(device)

    def check_target(self, model: Identity) -> None:
        """Raises: PrefixModelError, PrefixDtypeError: another model has read the document."""
        if model.config != self.target.config:
            raise PrefixModelError(
                f"the prefix was read by {self.target.name}, and the target is {model.name}, whose config is another: "
                "read the document with this target (specpass.read(model, document_ids))."
            )
        if model.dtype != self.target.dtype:
            raise PrefixDtypeError(
                f"the prefix was read in {self.target.dtype} and the target is in {model.dtype}: load the target in "
                f"{self.target.dtype}, or read the document with this one."
            )
        if model.weights != self.target.weights:
            raise PrefixModelError(
                f"the prefix was read by {self.target.name} with other weights than the target's ({model.name}; "
                "adapters count, and so does a process's part of a shared model): read the document with this target."
            )

    def check_draft(self, model: Identity) -> None:
        """Raises: PrefixDraftError: another draft has read the document, or none."""
        if self.drafter is None:
            raise PrefixDraftError(
                f"no draft has read the prefix, and the draft {model.name} is to write behind it: read the document "
                "with a model that is compiled with this draft, or pass lookahead_ids."
            )
        if model != self.drafter:
            what = "another" if model.config != self.drafter.config else "one of other weights or dtype"
            raise PrefixDraftError(
                f"the prefix was read by the draft {self.drafter.name} ({self.drafter.dtype}), and {model.name} "
                f"({model.dtype}) is {what}: compile the model with the draft that read it, or read the document anew."
            )
