"""Calls of the operating system that go wrong at a chosen point: the process dies, or the disk is full."""

import errno
import json
import os
import signal
from pathlib import Path


class Faults:
    """Calls of the operating system in ``folder``, by name, such as "fsync .checkpoint.pt"; one of them goes wrong.

    ``what`` is "die" (SIGKILL) or "full" (the disk is); ``when`` before the call, or after it; "die", "half" is in the
    middle of a write. ``None`` writes the names into the file calls.json beside the folder.
    """

    def __init__(self, folder, what, when="", label="", time=0):
        self.folder, self.what, self.when, self.label, self.time = str(folder), what, when, label, time
        self.paths, self.calls = {}, []
        for name in ("open", "write", "fsync", "fchmod", "replace", "ftruncate", "close"):
            setattr(os, name, self.watched(name, getattr(os, name)))
        fdopen = os.fdopen
        os.fdopen = lambda descriptor, mode: Watched(self, descriptor, fdopen(descriptor, mode))

    def name_of(self, path):
        name = Path(path).name
        if str(path) == self.folder:
            return "folder"
        return name.rsplit(".", 2)[0] if name.endswith(".tmp") else name  # without its random part

    def watched(self, name, call):
        def watch(first, *rest, **options):
            path = self.paths.get(first) if isinstance(first, int) else os.fspath(first)
            if path is None or not path.startswith(self.folder):
                return call(first, *rest, **options)
            shown = [path, *(rest[:1] if name == "replace" else [])]
            label = " ".join([name, *(self.name_of(part) for part in shown)])
            self.reach(label, "before")
            if name == "write":
                self.half(label, lambda: call(first, rest[0][: len(rest[0]) // 2]))
            value = call(first, *rest, **options)
            if name == "open":
                self.paths[value] = path
            elif name == "close":
                self.paths.pop(first, None)
            self.reach(label, "after")
            return value

        return watch

    def half(self, label, write):
        if (self.when, self.label) == ("half", label) and self.calls.count(label) == self.time:
            write()
            if self.what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def reach(self, label, when):
        if when == "before":
            self.calls.append(label)
            if self.what is None:
                Path(self.folder).with_name("calls.json").write_text(json.dumps(self.calls))
        if (self.label, self.when, self.time) == (label, when, self.calls.count(label)):
            if self.what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.what == "SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)
                return
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Watched:
    """A file whose writes are watched."""

    def __init__(self, faults, descriptor, file):
        self.faults, self.file = faults, file
        self.label = f"write {faults.name_of(faults.paths.get(descriptor, ''))}"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        def half():
            self.file.write(data[: len(data) // 2])
            self.file.flush()

        self.faults.reach(self.label, "before")
        self.faults.half(self.label, half)
        self.file.write(data)
        self.faults.reach(self.label, "after")
