"""What a BudgetCache kept of a prompt: positions, their shares by place, and a picture of them for notebooks."""

from __future__ import annotations

import base64
import html
import struct
import zlib
from typing import Any

import numpy as np

from specpass.observe.storage import cache_bytes

BINS = 800  # columns of a picture: about a pixel and a half each
ROW = 4  # pixels of a KV head in a notebook
BLUE = np.array([8, 48, 107])  # of a place that is kept whole; white where nothing is


def kept_positions(cache: Any, row: int = 0) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Prompt positions that a filled cache keeps of one sequence, by pruned layer and KV head."""
    return tuple(
        tuple(tuple(position for position in head if position >= 0) for head in layer.positions[row].tolist())
        for layer in cache.budgeted
    )


def matrix_of(kept: tuple[tuple[tuple[int, ...], ...], ...], length: int) -> np.ndarray:
    """[layers * KV heads, S] bool: what each head kept of a prompt of `length` tokens."""
    heads = [head for layer in kept for head in layer]
    matrix = np.zeros((len(heads), length), dtype=bool)
    for row, positions in enumerate(heads):
        matrix[row, list(positions)] = True
    return matrix


def binned(matrix: np.ndarray, bins: int = BINS) -> np.ndarray:
    """[rows, S] -> [rows, at most bins]: the share of each bin's positions that is kept."""
    width = -(-matrix.shape[1] // bins)
    padding = -matrix.shape[1] % width
    padded = np.pad(matrix.astype(float), ((0, 0), (0, padding)), constant_values=np.nan)
    return np.nanmean(padded.reshape(len(matrix), -1, width), axis=2)


def kept_html(cache: Any) -> str:
    """A line of text, and a picture of the first sequence: position across, layer and KV head down."""
    about = f"BudgetCache, {html.escape(cache.method.key)}"
    if not cache.filled or not cache.budgeted:
        return f"<p>{about}: no prompt was read yet</p>"
    kept = kept_positions(cache)
    length = 1 + max((position for layer in kept for head in layer for position in head), default=0)
    rows = sum(len(layer) for layer in kept)
    slots = max(len(head) for layer in kept for head in layer)
    about += f": {slots:,} of {length:,} prompt tokens in each KV head, {cache_bytes(cache) / 2**20:,.1f} MiB"
    picture = base64.b64encode(png(binned(matrix_of(kept, length)))).decode()
    style = f"width:100%;height:{ROW * rows}px;image-rendering:pixelated;border:1px solid #888"
    return (
        f'<figure style="margin:0"><img style="{style}" alt="what was kept" src="data:image/png;base64,{picture}"/>'
        f"<figcaption>{about}; down: {len(kept)} layers with {len(kept[0])} KV heads each, across: positions; "
        "blue is kept</figcaption></figure>"
    )


def png(shares: np.ndarray) -> bytes:
    """[rows, columns] of 0 to 1 as a PNG, white to blue, a pixel each (RFC 2083)."""
    pixels = np.round(255 + shares[..., None] * (BLUE - 255)).astype(np.uint8)
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)  # 0: no filter
    size = struct.pack(">IIBBBBB", shares.shape[1], shares.shape[0], 8, 2, 0, 0, 0)  # 8 bits, RGB
    chunks = ((b"IHDR", size), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
