"""Annotations in processes of their own, alone or together, that may be killed: as a launcher would start them."""

import multiprocessing
import os
import signal
import socket

DEADLINE_SECONDS = 300  # of a busy machine


def annotate_in_processes(arguments, *, num_processes=1, killed_at=None):
    """Call `annotate_file` with `arguments` and return the exit codes; `killed_at`: after so many blocks, at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["annotation_processes", "screformer.annotation.annotate"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_annotate, args=(arguments, rank, num_processes, port, killed_at))
        for rank in range(num_processes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(DEADLINE_SECONDS)
        process.kill()
    return [process.exitcode for process in processes]


def _annotate(arguments, rank, num_processes, port, killed_at):
    import torch

    from screformer.annotation import cell_source
    from screformer.annotation.annotate import annotate_file
    from screformer.annotation.cell_numbers import NumbersInFiles

    torch.set_num_threads(1)
    if num_processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    cell_source.CELLS_PER_BLOCK = 8
    write, written = NumbersInFiles.write, []

    def write_and_die(self, number, values):
        write(self, number, values)
        written.append(number)
        if killed_at is not None and len(written) == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    NumbersInFiles.write = write_and_die
    annotate_file(*arguments, batch_size=4, progress=False)
    (arguments[2].parent / f"written_by_{rank}_of_{num_processes}.txt").write_text(" ".join(map(str, written)))
