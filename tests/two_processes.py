"""Two processes as ``torchrun`` starts them, but forked: they need not import everything again."""

import os
import signal
import sys
import traceback
from collections.abc import Callable

from lightning.fabric.plugins.environments.lightning import find_free_network_port


def run_in_two(work: Callable[[], object]) -> int:
    """Call ``work`` in two processes, and kill the second to end if the first failed.

    Returns:
        The exit code of the one that failed, negative after a signal; 0 if none did.
    """
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(find_free_network_port()),
        "TORCHELASTIC_RUN_ID": "tests",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
    }
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
            code = 1
            try:
                work()
                code = 0
            except Exception:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    first, status = os.wait()
    (other,) = (child for child in children if child != first)
    if status:
        os.kill(other, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(each) for each in (status, os.waitpid(other, 0)[1])]
    return next((code for code in codes if code), 0)
