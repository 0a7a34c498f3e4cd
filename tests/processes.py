"""Two processes that compute together. They are forks, which start in milliseconds, with everything imported."""

import os
import socket
import warnings

from accelerate.state import AcceleratorState, GradientState
from torch.multiprocessing import start_processes

from seal_peft import cli


def seal_in_two_processes(*words: object) -> None:
    """Run `seal-peft` as `torchrun --nproc_per_node 2 -m seal_peft` does; raise where a process ends with an error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks of processes with threads
        start_processes(_seal, args=(port, list(map(str, words))), nprocs=2, start_method="fork")


def _seal(rank: int, port: int, words: list[str]) -> None:
    """Run the command line as one of the two, with the variables that `torchrun` sets."""
    rank_and_size = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in rank_and_size.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    AcceleratorState._reset_state(reset_partial_state=True)  # the tests before this one ran in a single process
    GradientState._reset_state()
    raise SystemExit(cli.main(words))
