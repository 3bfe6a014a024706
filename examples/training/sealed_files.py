"""Files that are whole or not there, and whose bytes are those that were written."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
import tempfile
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

LARGEST = 64 * 2**30  # bytes of a file that is read
SEAL = b"sha256:"
SEAL_BYTES = len(SEAL) + 64


class Damaged(ValueError):
    """A file that is not what was written."""


def save_atomically(path: Path, content: Any, *, keep_as: Path | None = None) -> None:
    """As ``torch.save``, with a seal: a zip file's comment, so that ``torch.load`` reads it as any other.

    ``keep_as`` is the name that a file before it gets.

    Raises:
        TypeError: something in it is no tensor and no plain value, which ``weights_only=True`` would refuse to read.
        OSError: it cannot be written; the file before it is kept.
    """
    check_plain(content)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(-2, os.SEEK_END)  # a zip file ends with the length of its comment
    buffer.write(SEAL_BYTES.to_bytes(2, "little") + SEAL)
    buffer.write(hashlib.sha256(buffer.getbuffer()).hexdigest().encode())
    write_atomically(path, buffer.getbuffer(), keep_as=keep_as)


def write_atomically(path: Path, data: bytes | memoryview, *, keep_as: Path | None = None) -> None:
    """All of it or nothing: a crash at any moment leaves the old file or the new one; the old one is kept as asked for.

    Raises:
        OSError: it cannot be written; with its path and length.
    """
    temporary = None
    try:
        # Of a name that nobody can foresee, opened by nobody else, and readable by nobody else before it is whole.
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.fsync(file.fileno())
        if keep_as is not None:
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, keep_as)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too
        finally:
            os.close(folder)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        reason = f"{error.strerror or error}: the {len(data)} bytes of {path} cannot be written"
        raise OSError(error.errno, reason) from error


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def load_safely(path: Path, *, sealed: bool = True, limit: int = LARGEST) -> Any:
    """What ``save_atomically`` wrote: tensors and plain values, and never code.

    ``sealed=False`` takes files of others, too, whose bytes nothing vouches for.

    Raises:
        Damaged: the seal does not fit, or there is none; or no file of tensors and plain values.
        ValueError: more than ``limit`` bytes.
        OSError: the file cannot be read.
    """
    if TorchVersion(torch.__version__) < (2, 6):  # CVE-2025-32434: weights_only ran code all the same
        raise RuntimeError(f"load_safely: torch must be 2.6 or newer to read {path}, got {torch.__version__}")
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"load_safely: path must be a file, got {path}")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"load_safely: {path} must have at most {limit} bytes, got {size}")
        if sealed:
            _check_seal(path, file, size)
        try:
            entries = zipfile.ZipFile(file).infolist()
            # torch.save does not compress; an entry that does can hold a thousand times its bytes.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("it is compressed")
            if sum(entry.file_size for entry in entries) > size:
                raise ValueError("its entries are larger than the file")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of nearly any type
            raise Damaged(f"{path} is damaged, or no file of tensors and plain values: {error}") from error


def hash_of(path: Path) -> str:
    """SHA-256 of the file."""
    with open(path, "rb") as file:
        return _hash(file, os.fstat(file.fileno()).st_size)


def _hash(file: BinaryIO, left: int) -> str:
    digest = hashlib.sha256()
    while left > 0 and (block := file.read(min(left, 2**20))):
        digest.update(block)
        left -= len(block)
    return digest.hexdigest()


def _check_seal(path: Path, file: BinaryIO, size: int) -> None:
    if size < 64 or _hash(file, size - 64).encode() != file.read():
        raise Damaged(f"{path} is damaged: {size} bytes that do not fit the seal at their end")


def check_plain(content: Any, name: str = "content") -> None:
    if isinstance(content, dict):
        for key, value in content.items():
            check_plain(key, f"a key of {name}")
            check_plain(value, f"{name}[{key!r}]")
    elif type(content) in (list, tuple):
        for i, value in enumerate(content):
            check_plain(value, f"{name}[{i}]")
    elif not (content is None or isinstance(content, Tensor) or type(content) in (bool, int, float, str)):
        raise TypeError(f"save_atomically: {name} must be a tensor or a plain value, got {type(content)}")
