"""Large blocks of memory serve again while a prompt is read, and never two readers at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from specpass.kernels.cpu import blocks


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is large, and how much of it may lie idle."""
    monkeypatch.setattr(blocks, "LARGE", 1000)
    monkeypatch.setattr(blocks, "IDLE", 5000)
    with blocks.reused():
        yield


def take(rows: int, width: int = 100) -> Tensor:
    return blocks.empty_strided((rows, width), (width, 1), torch.float32)


def address(block: Tensor) -> int:
    return block.untyped_storage().data_ptr()


def test_what_nobody_reads_serves_again() -> None:
    first = take(10)
    view, place = first[2:], address(first)
    del first
    second = take(10)
    assert address(second) != place, "a view still reads the first"
    del view
    other = blocks.empty_strided((5, 200), (1, 5), torch.float32)
    assert address(other) == place
    assert other.shape == (5, 200)
    assert other.stride() == (1, 5)


def test_another_dtype_has_a_block_of_its_own() -> None:
    place = address(take(10))
    assert address(blocks.empty_strided((20, 100), (100, 1), torch.bfloat16)) != place


def test_only_the_largest_size_stays() -> None:
    small = [take(10), take(10)]
    places = {address(block) for block in small}
    large = take(20)
    assert blocks._blocks.held is not None
    assert [block.numel() for block in blocks._blocks.held] == [2000]
    del small
    again = [take(10), take(10)]
    assert all(not any(address(block) == address(own) for own in blocks._blocks.held) for block in again)
    del large, again, places


def test_idle_blocks_go_when_another_size_needs_room() -> None:
    both = [take(10), take(10)]  # 4,000 bytes each: one may lie idle
    assert len(blocks._blocks.held or ()) == 2
    del both
    take(5)
    assert len(blocks._blocks.held or ()) == 1


def test_blocks_end_with_the_call_and_belong_to_its_thread() -> None:
    place = address(take(10))
    seen: list[int] = []

    def elsewhere() -> None:
        assert blocks._blocks.held is None
        seen.append(address(take(10)))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen != [place]
    with blocks.reused():
        assert blocks._blocks.held == []
        inner = take(10)
    assert address(inner) != place
    assert address(take(10)) == place
