"""Two processes that compute together, started by the launcher that the docs name."""

import os
import subprocess
import sys


def launch_two(*program: object) -> str:
    """Run `accelerate launch` with two processes on the CPU and return what they print; raise if they fail.

    Args:
        program: A script, or `-m` and a module, and its words.
    """
    # Without GPUs this launcher starts processes on the CPU; `--cpu` starts a single one (accelerate 1.15).
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--main_process_port", "0"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    command = [*launcher, *map(str, program)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout
