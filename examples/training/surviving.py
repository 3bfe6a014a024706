"""What a training is told from outside: signals, lost processes, a terminal that went away."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from training.shown_names import visible

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Trouble(Exception):
    """What ends a training from outside of the program; told in a line."""


class Stop:
    """The first SIGTERM or SIGINT asks for an end after the step, by its number; a second one is the end at once."""

    def __enter__(self) -> Stop:
        self.signal = 0
        self.before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        self.signal = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)


def leave_signals_to_the_first(worker: int) -> None:
    """A terminal sends Ctrl-C to all processes; those that load images are needed for the step that is finished."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def workers_may_die(folder: Path) -> Iterator[None]:
    """A process that loads images and was killed, or takes longer than ``--worker-timeout``, ends the training."""
    try:
        yield
    except BaseException as error:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the loader's handler raises anew for each that ends
        for child in multiprocessing.active_children():  # Python would wait for one that hangs
            child.kill()
        lost = isinstance(error, (ConnectionError, EOFError))  # it ended while it was handing over a batch
        if lost or (isinstance(error, RuntimeError) and str(error).startswith("DataLoader ")):
            reason = f"DataLoader worker is gone: {error}" if lost else str(error).splitlines()[0]
            raise Trouble(f"{reason}; --resume goes on from the last checkpoint in {folder}") from error
        raise


class Unbreakable:
    """A stream whose reader may leave, or a disk that may be full: what is told is lost, and nothing else."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def as_program(main: Callable[[], None]) -> None:
    """Run an example: 2 for what it refuses and 1 for other trouble, told in a line; ``--traceback`` tells where."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
        setattr(sys, name, Unbreakable(stream))
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError, Trouble) as error:
        if "--traceback" in sys.argv:
            traceback.print_exc()
        # From a process that loads images comes a whole traceback, with the reason on its last line.
        reason = str(error).strip().splitlines()[-1] if "Original Traceback" in str(error) else str(error)
        kind = "" if type(error) in (ValueError, Trouble) else f"{type(error).__name__}: "
        print(f"{Path(sys.argv[0]).name}: {kind}{visible(reason)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
