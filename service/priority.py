"""Who goes first on a busy machine: the loop that takes and answers requests, before the threads that work on them."""

import os
import threading

GIVES_WAY = 19
"""How nice threads and processes are that decode, measure, classify and write."""


def give_way() -> None:
    """Let the calling thread, and those that it will begin, go after the loop; a loop that waits looks dead from outside."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), GIVES_WAY)
