"""A time limit for Python that comes from others, such as chat templates."""

import contextlib
import ctypes
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in a block of Python that takes longer.

    A second thread has the interpreter raise it between two instructions. A signal would do only in
    the main thread, and a process to kill would have to import everything again.
    """
    lock, ended, thread = threading.Lock(), threading.Event(), ctypes.c_ulong(threading.get_ident())

    def interrupt() -> None:
        with lock:  # never after the block
            if not ended.is_set():
                raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
                raise_in(thread, ctypes.py_object(TimeoutError))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            ended.set()
        timer.cancel()
