"""The processes that share a run: one, or as many as `torchrun` or `accelerate launch` started."""

from __future__ import annotations

import os
from typing import NamedTuple


class Processes(NamedTuple):
    """Which of how many processes this one is, and the device that is its own (None: whichever there is)."""

    rank: int = 0
    num_processes: int = 1
    device: str | None = None

    @property
    def is_main(self) -> bool:
        """Whether it is the first, which writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.num_processes > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


def find_processes() -> Processes:
    """Return the processes of this run, and join them if there are several."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Processes()
    import torch
    from accelerate import PartialState

    # Without an accelerator, and not told so, it would take each process for the only one.
    state = PartialState(cpu=not torch.accelerator.is_available())
    return Processes(state.process_index, state.num_processes, str(state.device))
