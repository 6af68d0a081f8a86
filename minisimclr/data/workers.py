"""Spread a function over fresh Python processes.

Not threads: on small pictures Pillow's calls are too short to overlap (two threads gained 5 % where
two processes gained 95 %). Not fork: the program may have threads or a GPU in use. Not the standard
library's spawn: it runs the caller's script again and fails where that has no main guard. So each
worker is a plain child that answers pickled questions until its input ends, as it does when this
process dies, however it dies.
"""

import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from queue import SimpleQueue
from subprocess import PIPE, Popen, TimeoutExpired
from threading import Thread
from typing import Any

from ..errors import DataError
from ..files import fcntl

ANSWER = 1 << 20  # bytes of buffer, so that a worker need not wait for its answer to be read


def parallel_map(function: Callable, items: Iterable, workers: int) -> Iterator[Any]:
    """function(item) for each item, in order; `function` and the items must be picklable.

    Reads only a few items ahead. What `function` raises is raised here, and DataError if a worker
    dies; nobody waits for what the others are doing. With fewer than two workers it all happens in
    this process.
    """
    if workers < 2:
        yield from map(function, items)
        return
    idle: SimpleQueue = SimpleQueue()

    def run(item: Any) -> Any:
        process = idle.get()
        try:
            return ask(process, function, item)
        finally:
            idle.put(process)

    with ExitStack() as stack:
        processes = []
        for _ in range(workers):
            processes.append(process := start())
            stack.callback(process.communicate)  # closes its input and waits for it to end
            idle.put(process)
        pool = ThreadPoolExecutor(workers)
        stack.callback(pool.shutdown, cancel_futures=True)
        for process in processes:
            stack.callback(process.kill)  # first of all: nobody wants what is still being made
        pending: deque = deque()
        for item in items:
            pending.append(pool.submit(run, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def start() -> Popen:
    """A new worker, with this process's import path and no threads of its own."""
    # What a module prints on import must not get between the answers. Python skips all but strings
    # in its path, and in PYTHONPATH no folder's name may hold a colon.
    path = [folder for folder in sys.path if isinstance(folder, str)]
    code = f"import os, sys; out = os.dup(1); os.dup2(2, 1); sys.path[:] = {path!r}; "
    code += f"from {__name__} import serve; serve(out)"
    command = [sys.executable, "-P", "-c", code]  # -P: not from the current folder, to begin with
    here = {"OPENBLAS_NUM_THREADS": "1"}
    process = Popen(  # in a process group of its own, which Ctrl-C in a terminal does not reach
        command, env=os.environ | here, stdin=PIPE, stdout=PIPE, bufsize=ANSWER,
        process_group=0, creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )  # fmt: skip
    for pipe in (process.stdin, process.stdout):
        with suppress(AttributeError, OSError):  # only Linux can, and 64 MiB for all of a user's
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, ANSWER)  # type: ignore[arg-type]
    return process


def ask(process: Popen, function: Callable, item: Any) -> Any:
    """function(item), computed by the worker."""
    try:
        pickle.dump((function, item), process.stdin, pickle.HIGHEST_PROTOCOL)  # type: ignore
        process.stdin.flush()  # type: ignore
        answer = pickle.load(process.stdout)  # type: ignore
    except Exception as error:  # what `function` raises is an answer; this is the worker's end
        with suppress(TimeoutExpired):
            process.wait(1)  # else its answer makes no sense
        process.kill()
        status = process.wait()
        advice = "see above" if status > 0 else "free some memory, then try again"
        raise DataError(
            f"a worker process ended (exit status {status}) while preparing data: {advice}"
        ) from error
    if isinstance(answer, BaseException):
        raise answer
    return answer


def serve(out: int) -> None:
    """The worker's side of `ask`, which reads from the descriptor `out`. It ends with its input,
    even in the midst of a call.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business (Windows)
    asked: SimpleQueue = SimpleQueue()
    Thread(target=answer, args=(asked, out), daemon=True).start()
    questions = os.fdopen(os.dup(0), "rb")
    with suppress(OSError, EOFError, pickle.UnpicklingError):  # nobody is left to answer to
        while questions.peek(1):
            asked.put(pickle.load(questions))
    os._exit(0)  # without tidying up, which would keep the other side waiting


def answer(asked: SimpleQueue, out: int) -> None:
    """Answer each (function, item) asked, by a result or an error."""
    try:
        with suppress(OSError), os.fdopen(out, "wb") as answers:  # nobody is left to answer to
            while True:
                function, item = asked.get()
                try:
                    result = function(item)
                except Exception as error:
                    result = error
                pickle.dump(result, answers, pickle.HIGHEST_PROTOCOL)
                answers.flush()
    except BaseException:  # the function's, or what it made cannot be pickled
        traceback.print_exc()
    os._exit(1)
