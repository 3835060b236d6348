"""Where the numbers of a quantised layer lie: one block of bytes for every GROUP slots of a KV head.

Keys are quantised per channel, in groups of GROUP slots; values per token, in groups along the head dimension (KIVI,
arXiv 2402.02750; GEAR, arXiv 2403.05527). Each group has a scale and a zero in the model's dtype. A byte holds 8 / bits
codes: byte j of a row of codes has those of dimensions j, j + w, j + 2 w, ..., lowest bits first, where a row has
w = D * bits / 8 bytes.

With 2 bits there is what GEAR adds (X = D + L + S, D the codes): of each group of keys and of values the number that is
farthest from the group's mean is left out of its range and kept apart with its place (S: one of 64, near the paper's
2 %), and what is then missing is made up by RANK columns for all of a head's slots (L = A B^T).

Symbols: B batch, K KV heads, C slots, n = ceil(C / GROUP) blocks, D and Dv head dimensions, e bytes of a number.
"""

from __future__ import annotations

import dataclasses
import functools

GROUP = 64  # slots of a block, and numbers of a group
RANK = 2  # GEAR takes 4 for prompts (D = 128): as many bytes for each slot as 4 bits would take where D = 64
BITS = (8, 4, 2)
DTYPES = ("float32", "float16", "bfloat16")  # of keys and values, and so of scales
MULTIPLE = 8  # of which a head dimension is one: whole bytes of codes, and aligned numbers behind them


@dataclasses.dataclass(frozen=True)
class Field:
    """One array of a block: its shape, whether its numbers are bytes (else of the model's dtype), and its bytes."""

    shape: tuple[int, ...]
    bytes: bool
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """A block of GROUP slots of one KV head.

    Args: bits: 8, 4 or 2. dim, value_dim: D and Dv. itemsize: e.
    """

    bits: int
    dim: int
    value_dim: int
    itemsize: int

    @property
    def corrected(self) -> bool:
        """Whether there are outliers and a low rank beside the codes."""
        return self.rank > 0

    @property
    def rank(self) -> int:
        """Columns of the low rank."""
        return rank_of(self.bits)

    @property
    def value_group(self) -> int:
        """Numbers of a group of values: GROUP where Dv is a multiple of it, else all of a token's."""
        return self.value_dim if self.value_dim % GROUP else GROUP

    @property
    def value_groups(self) -> int:
        """Groups of one token's values."""
        return self.value_dim // self.value_group

    @functools.cached_property
    def fields(self) -> dict[str, Field]:
        """Arrays of a block by name, in order: codes, then what is of the model's dtype, then places."""
        arrays: dict[str, tuple[tuple[int, ...], bool]] = {
            "key_codes": ((GROUP, self.dim * self.bits // 8), True),
            "value_codes": ((GROUP, self.value_dim * self.bits // 8), True),
            "key_scale": ((1, self.dim), False),
            "key_zero": ((1, self.dim), False),
            "value_scale": ((GROUP, self.value_groups, 1), False),
            "value_zero": ((GROUP, self.value_groups, 1), False),
        }
        if self.corrected:
            arrays |= {
                "key_factor": ((GROUP, self.rank), False),
                "value_factor": ((GROUP, self.rank), False),
                "key_outlier": ((1, self.dim), False),
                "value_outlier": ((GROUP, self.value_groups, 1), False),
                "key_place": ((1, self.dim), True),
                "value_place": ((GROUP, self.value_groups, 1), True),
            }
        found, start = {}, 0
        for name, (shape, plain) in arrays.items():
            size = functools.reduce(int.__mul__, shape) * (1 if plain else self.itemsize)
            found[name] = Field(shape, plain, start, start + size)
            start += size
        return found

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return max(field.end for field in self.fields.values())

    def head_bytes(self, slots: int) -> int:
        """Bytes of one KV head of one row with C slots: its blocks, and with 2 bits the factors B."""
        return blocks_of(slots) * self.block_bytes + self.rank * (self.dim + self.value_dim) * self.itemsize


def rank_of(bits: int) -> int:
    """Columns of the low rank beside so many bits."""
    return RANK if bits == 2 else 0


def blocks_of(slots: int) -> int:
    """n blocks for C slots."""
    return -(-slots // GROUP)


def why_unserved(dim: int, value_dim: int, dtype: str = DTYPES[0]) -> str:
    """Why keys [.., D] and values [.., Dv] of a dtype stay as they are; "" where they can be quantised."""
    if dtype not in DTYPES:
        return f"keys and values are of {dtype}"
    odd = next((size for size in (dim, value_dim) if size % MULTIPLE or size > 256), None)
    return "" if odd is None else f"head dimension {odd} is no multiple of {MULTIPLE} up to 256"
