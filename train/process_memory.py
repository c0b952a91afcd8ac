"""What a process that trains or predicts keeps of freed memory."""

from screformer.tokenization.freed_memory import return_blocks_from

# Setting the threshold also stops glibc from raising it, which it does up to 32 MB: then streams of a base model share
# one heap with small blocks that stay, and holes between those add a third to a training step's memory at 6 layers.
# Below 8 MB the blocks of a layer's inner work would go back and be cleared again, thousands of times a step.
STREAM_BYTES = 8 * 10**6


def return_large_blocks() -> bool:
    """Let the C library hand freed blocks of 8 MB and more back to the system at once; return whether it does so."""
    return return_blocks_from(STREAM_BYTES)
