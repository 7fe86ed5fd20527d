"""vLLM's engine process ends when the process that started it is gone, also after kill -9. No vLLM."""

import multiprocessing
import os
import signal
import threading
import time

_POLL_S, _GRACE_S = 1.0, 10.0


def end_with_parent() -> None:
    """Watch this process's parent, in a thread; once it has ended, so does this process.

    vLLM's own parent tells its engine to stop, which it cannot when it was killed (by hand, by the system for want of
    memory, by Ray). The engine would then keep the device's memory, and the next run would find none. Does nothing in a
    process that multiprocessing did not start: the engine is then in its user's own process.
    """
    if multiprocessing.parent_process() is None:
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_S)
        os.kill(os.getpid(), signal.SIGTERM)  # vLLM then stops its workers
        time.sleep(_GRACE_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()
