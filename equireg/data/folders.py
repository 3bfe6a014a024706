"""Listing folders of images: sorted, never outside of the root, every error with its path."""

from __future__ import annotations

import os
from collections.abc import Sequence

from equireg._checks import Arguments
from equireg.data.image_files import ImageFiles

_ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
_FIRST_BYTES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*")


class Folder:
    """An existing folder; errors name the reader, and links may not leave ``base``."""

    def __init__(self, reader: str, path: str | os.PathLike[str], follow_links: bool, base: str | None = None):
        self.args = Arguments(reader)
        self.args.option("follow_links", follow_links, (True, False))
        try:
            self.path = os.path.abspath(os.fsdecode(path))
        except TypeError:
            self.args.fail_type("root", "the path of a folder", type(path).__name__)
        self.follow_links = follow_links
        self.base = os.path.realpath(self.path) if base is None and "\0" not in self.path else base or ""
        self._entries(self.path)

    def inside(self, name: str) -> Folder:
        return Folder(self.args.function, os.path.join(self.path, name), self.follow_links, self.base)

    def folders(self) -> list[str]:
        """The names of the folders in it, sorted, without hidden ones."""
        return [entry.name for entry in self._entries(self.path) if _is_folder(entry)]

    def classes(self) -> list[str]:
        """The names of the folders in it, sorted; at least two."""
        names = self.folders()
        if len(names) < 2:
            found = f"one folder, {names[0]!r}, alone" if names else "no folder"
            self.args.fail("root", "a folder with a folder for each class", f"{self.path!r} with {found} in it")
        return names

    def images(self, name: str) -> list[str]:
        """The paths of the images in the folder ``name`` and below it, sorted; at least one."""
        folder = os.path.join(self.path, name)
        found = self._images_below(folder, (os.path.realpath(folder),))
        if not found:
            self.args.fail(f"folder {folder!r}", "one with images in it", "none")
        return found

    def labelled(self, classes: Sequence[str]) -> tuple[list[str], list[int]]:
        """The paths of the images of all ``classes``, and their labels: the positions of the classes."""
        paths, labels = [], []
        for label, name in enumerate(classes):
            found = self.images(name)
            paths += found
            labels += [label] * len(found)
        return paths, labels

    def _images_below(self, folder: str, above: tuple[str, ...]) -> list[str]:
        files, deeper = [], []
        for entry in self._entries(folder):
            if _is_folder(entry):
                real = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                if real not in above:  # a link to a folder above would recurse forever
                    deeper += self._images_below(entry.path, (*above, real))
            # A dangling link is a broken image; a pipe is not an image.
            elif (entry.is_symlink() or entry.is_file()) and _is_image(entry):
                files.append(entry.path)
        return files + deeper

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as found:
                entries = sorted((entry for entry in found if entry.name[0] != "."), key=lambda entry: entry.name)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{self.args.function}: root must be a folder that exists, got {folder!r}"
            ) from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = getattr(error, "strerror", None) or error
            self.args.fail("root", "a folder that can be read", f"{folder!r}: {reason}")
        if not self.follow_links:
            for entry in entries:
                if entry.is_symlink():
                    self._refuse_leaving(entry.path)
        return entries

    def _refuse_leaving(self, link: str) -> None:
        target = os.path.realpath(link)
        if os.path.commonpath([self.base, target]) != self.base:
            rule = "one inside of root, or follow_links=True"
            self.args.fail(f"link {link!r}", rule, f"{target!r} outside of {self.base!r}")


def class_names(args: Arguments, class_list: str | os.PathLike[str] | Sequence[str]) -> list[str]:
    """The names of a class list, or of its text file, each the plain name of a folder."""
    if isinstance(class_list, (str, os.PathLike)):
        path = os.path.abspath(class_list)
        try:
            with open(path, "rb") as file:
                lines = file.read().removeprefix(b"\xef\xbb\xbf").splitlines()
        except FileNotFoundError:
            raise FileNotFoundError(f"{args.function}: class_list must be a file that exists, got {path!r}") from None
        except (OSError, ValueError) as error:
            args.fail("class_list", "a text file that can be read", f"{path!r}: {error}")
        names = [os.fsdecode(line.split(b"\t")[0].strip()) for line in lines]
        names = [name for name in names if name]
    else:
        names = list(class_list)
    for name in names:
        if not isinstance(name, str):
            args.fail_type("class_list", "the path of a file, or names", f"a {type(name).__name__} in it")
        separators = {os.sep, os.altsep or os.sep, "\0"}
        if name in ("", ".", "..") or os.path.splitdrive(name)[0] or separators & set(name):
            args.fail("class_list", "a list of the plain names of folders in root", repr(name))
    if not names:
        args.fail("class_list", "a list of one class or more", "none")
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()
    if twice:
        args.fail("class_list", "a list that names each class once", repr(sorted(twice)[0]))
    return names


def refuse_emptied(args: Arguments, files: ImageFiles) -> None:
    """Raise if a class lost all of its images as broken ones."""
    counts = files.labels.bincount(minlength=len(files.classes))
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        reasons = "; ".join(reason for _, reason in files.skipped[:3])
        got = f"none; {len(files.skipped)} files skipped {reasons}".strip()
        args.fail(f"class {files.classes[empty[0]]!r}", "one with images that can be decoded", got)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    if entry.name.lower().endswith(_ENDINGS):
        return True
    try:
        with open(entry.path, "rb") as file:
            start = file.read(12)
    except OSError:
        return False
    return start.startswith(_FIRST_BYTES) or (start[:4] == b"RIFF" and start[8:] == b"WEBP")
