"""Rectangles of a batch that are worked on one after another, so that what lies between stays small and in cache."""

from typing import NamedTuple

import torch
from torch import Tensor

# What a layer holds between its input and its output grows with a block, not with the batch. On a CPU smaller blocks
# are faster too: memory of tens of megabytes is returned to the system and cleared again at every use.
CPU_ATTENTION_TOKENS, CPU_FEED_FORWARD_TOKENS = 8192, 2048
# On accelerators a block still has enough tokens to fill the device: 30 and 15 cells with every gene.
ACCELERATOR_ATTENTION_TOKENS, ACCELERATOR_FEED_FORWARD_TOKENS = 2**19, 2**18


class TokenBlock(NamedTuple):
    """Some tokens of some cells, (cells, tokens) of a (B, L, ...) tensor."""

    cells: slice
    tokens: slice

    def of(self, tensor: Tensor) -> Tensor:
        """Return the block's view of a (B, L, ...) tensor."""
        return tensor[self.cells, self.tokens]


class BlockPlan(NamedTuple):
    """Blocks of whole cells, for attention, and smaller ones, for what each token undergoes alone.

    Together either kind holds every token; padding behind a block's longest cell is in none. Each attention block has
    its part of the mask, None where nothing is padding.
    """

    attention: list[TokenBlock]
    masks: list[Tensor | None]
    feed_forward: list[TokenBlock]


def most_tokens(device_type: str) -> tuple[int, int]:
    """Return how many tokens attention and feed-forward handle at once, unless a single cell has more."""
    if device_type == "cpu":
        return CPU_ATTENTION_TOKENS, CPU_FEED_FORWARD_TOKENS
    return ACCELERATOR_ATTENTION_TOKENS, ACCELERATOR_FEED_FORWARD_TOKENS


def plan_blocks(hidden_states: Tensor, attention_mask: Tensor | None) -> BlockPlan:
    """Cut a batch (B, L, hidden) into blocks; on accelerators padding is in them, because to look at it is to wait."""
    batch, width = hidden_states.shape[:2]
    is_cpu = hidden_states.device.type == "cpu"
    extents = _extents(attention_mask, batch, width) if is_cpu else [width] * batch
    most_attention, most_feed_forward = most_tokens(hidden_states.device.type)
    cells = _blocks_of_cells(extents, most_attention)
    parts = [part for block in cells for part in _split(block, most_feed_forward)]
    return BlockPlan(cells, [_mask_of(block, attention_mask) for block in cells], parts)


def _mask_of(block: TokenBlock, attention_mask: Tensor | None) -> Tensor | None:
    if attention_mask is None:
        return None
    mask = block.of(attention_mask)
    return None if bool(mask.all()) else mask


def _extents(attention_mask: Tensor | None, batch: int, width: int) -> list[int]:
    """Return up to where each cell has tokens."""
    if attention_mask is None:
        return [width] * batch
    positions = torch.arange(1, width + 1, device=attention_mask.device)
    return (attention_mask.to(torch.bool) * positions).amax(dim=-1).tolist()


def _blocks_of_cells(extents: list[int], most: int) -> list[TokenBlock]:
    """Join neighbouring cells as long as their block, padding included, stays below ``most`` tokens."""
    blocks, start, longest = [], 0, 0
    for cell, extent in enumerate(extents):
        joined = max(longest, extent)
        if cell > start and joined * (cell + 1 - start) > most:
            blocks.append(TokenBlock(slice(start, cell), slice(0, longest)))
            start, joined = cell, extent
        longest = joined
    return [*blocks, TokenBlock(slice(start, len(extents)), slice(0, longest))]


def _split(block: TokenBlock, most: int) -> list[TokenBlock]:
    """Cut a block between cells or, where a cell alone is too long, between tokens."""
    extent = max(1, block.tokens.stop)
    step = max(1, most // extent)
    rows = [slice(i, min(i + step, block.cells.stop)) for i in range(block.cells.start, block.cells.stop, step)]
    width = most if step == 1 else extent
    columns = [slice(i, min(i + width, extent)) for i in range(0, extent, width)]
    return [TokenBlock(cells, tokens) for cells in rows for tokens in columns]
