"""Extract single files from .zip and .tar archives safely, even if the archive is hostile."""

import errno
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from itertools import islice
from pathlib import Path, PurePosixPath

from ..errors import UserError
from ..files import is_safe_relative_path

MAX_MEMBERS = 100_000  # of an archive
MAX_HEADER = 1 << 20  # bytes of an extended header, which contains, for example, a long name
MAX_RATIO, MIN_LIMIT = 100, 1 << 30  # text compresses by 3 to 10, a decompression bomb by 1,000 and more
BLOCK = 1 << 20
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zipfile.LargeZipFile, lzma.LZMAError, zlib.error, struct.error)
UNSUPPORTED = (NotImplementedError, RuntimeError)  # how zipfile refuses unknown methods and encrypted members


class _TarInfo(tarfile.TarInfo):
    """Refuses a member with an oversized extended header, because tarfile reads the whole header into memory."""

    def _proc_member(self, archive):  # the method that tarfile offers for overriding
        if not self.isreg() and self.size > MAX_HEADER:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(archive)


def size_limit(archive: Path) -> int:
    """Return how many bytes may be read from a compressed file: 100 times its size, or 1 GiB if that is more."""
    return max(MIN_LIMIT, MAX_RATIO * archive.stat().st_size)


def extract(archive: Path, members: list[str], folder: Path) -> None:
    """Write `members` of a .zip or (compressed) .tar file below `folder`, block by block.

    Raises UserError, before anything is written, if the archive has a link, a device or a path that leads out of it, or
    if a member is missing, is a folder or occurs twice; and if the archive is damaged, encrypted, or beyond the limits.
    """
    entries: list[tuple]
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                infos = file.infolist()
                entries = [(i.filename, i.filename.endswith("/"), _is_special(i.external_attr), i) for i in infos]
                _write(archive, entries, members, folder, file.open)
        else:
            with tarfile.open(archive, tarinfo=_TarInfo) as file:
                some = islice(file, MAX_MEMBERS + 1)
                entries = [(i.name, i.isdir(), not (i.isfile() or i.isdir()), i) for i in some]
                _write(archive, entries, members, folder, file.extractfile)
                while file.fileobj and file.fileobj.read(BLOCK):  # to the end, where .gz has its checksum
                    pass
    except UNSUPPORTED as error:
        raise UserError(f"{archive}: cannot be read ({error}); extract it yourself and use --raw-dir") from None
    except (*DAMAGED, EOFError, ValueError, OSError) as error:
        if getattr(error, "errno", None) not in (None, errno.EINVAL):  # a full disk; EINVAL: seeking to a wrong offset
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"{archive}: damaged archive ({reason}); remove it and run again") from None


def _is_special(external_attributes):
    """Return whether a member of a .zip is neither a file nor a folder, by the mode of its Unix file."""
    return stat.S_IFMT(external_attributes >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR)


def _write(archive, entries, members, folder, open_entry):
    if len(entries) > MAX_MEMBERS:
        raise UserError(f"{archive}: refused because it has more than {MAX_MEMBERS:,} members")
    for name, is_folder, is_special, _ in entries:
        if is_special or not is_safe_relative_path(f"{name}/x" if is_folder else name):
            raise UserError(f"{archive}: refused because it contains a link or an unsafe path: {name!r}")
    names = [str(PurePosixPath(name)) for name, *_ in entries]
    count = Counter(names)
    for member in members:
        if count[member] != 1:
            raise UserError(f"{archive}: has {f'{member} twice' if count[member] else f'no {member}'}")
    wanted = {name: entry for name, entry in zip(names, entries, strict=True) if name in members}
    for member, (_, is_folder, _, _) in wanted.items():
        if is_folder:
            raise UserError(f"{archive}: {member} is a folder, not a file")
    limit = size_limit(archive)
    for member, (*_, entry) in wanted.items():  # in the archive's order, so that it is read once
        path = folder / member
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_entry(entry) as content, open(path, "wb") as out:
            while block := content.read(BLOCK):
                limit -= len(block)
                if limit < 0:
                    size = size_limit(archive)
                    raise UserError(
                        f"{archive}: refused because it expands to more than {size:,} bytes; extract it yourself"
                    )
                out.write(block)
