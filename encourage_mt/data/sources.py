"""Where a recipe's files come from: at hand, downloaded before, or downloaded now; alone or in archives."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import UserError
from ..files import file_hash
from ..recipe import Corpus, Recipe
from .archives import extract
from .download import download, is_html, matches


@dataclass
class Sources:
    """Finds the files that a recipe names, "FILE" or "ARCHIVE:MEMBER".

    A file is taken from `raw_dir` (or its subfolder named after the recipe or its corpus) if that is given, else from
    `download_dir`, where it is downloaded unless it is there. For the members of an archive that is not in `raw_dir`,
    the extracted files will do. `found` tells what was used: {name: {"path", "bytes", "sha256", "checked"}}.
    """

    recipe: Recipe
    raw_dir: Path | None
    download_dir: Path

    def __post_init__(self):
        self.found = {}
        self.corpus = self.recipe.data[0]
        if self.raw_dir is not None and not self.raw_dir.is_dir():
            raise UserError(f"{self.raw_dir}: no such folder")

    def find_local(self, name: str) -> Path | None:
        """The file in `raw_dir` (without it, and without addresses, by its own path or beside the recipe), or None."""
        if self.raw_dir is None:
            paths = [] if self.corpus.urls else [Path(name), self.recipe.file.parent / name]
            return next((path for path in paths if path.is_file()), None)
        for folder in (self.raw_dir, self.raw_dir / self.recipe.name, self.raw_dir / self.recipe.corpus):
            for relative in (name, PurePosixPath(name).name):
                if (folder / relative).is_file():
                    return folder / relative
        return None

    def choose(self) -> Corpus:
        """The alternative of the recipe's data to be used: the first with all files at hand, else the first."""
        for corpus in reversed(self.recipe.data):
            names = {name for lists in corpus.splits.values() for files in lists for name in files}
            if all(self.find_local(name.partition(":")[0]) for name in names):
                self.corpus = corpus
        return self.corpus

    def files(self, names: list[str], extracted: Path) -> dict[str, Path]:
        """{name: file} for names as the recipe has them; members of archives are extracted below `extracted`.

        Raises UserError if one is nowhere to be had, is not the published one, or if an archive is not to be trusted.
        """
        paths: dict[str, Path] = {}
        members: dict[str, list[str]] = {}
        for name in dict.fromkeys(names):
            archive, _, member = name.partition(":")
            if not member:
                paths[name] = self._file(name)
            elif self.find_local(archive) is None and self.find_local(member) is not None:
                paths[name] = self._file(member)
            else:
                members.setdefault(archive, []).append(member)
        for archive, wanted in members.items():
            folder = extracted / archive
            extract(self._file(archive), wanted, folder)
            paths.update({f"{archive}:{member}": folder / member for member in wanted})
        return paths

    def _file(self, name):
        if name in self.found:
            return Path(self.found[name]["path"])
        checksums = self.corpus.checksums.get(name, [])
        path = self.find_local(name)
        if path is None:
            path = self._downloaded(name, checksums)
        elif is_html(path):
            raise UserError(f"{path}: a web page, not the file it is named after")
        elif checksums and not matches(path, checksums):
            raise UserError(f"{path}: is not the published file ({' or '.join(checksums)})")
        digest = file_hash(path)
        checked = " or ".join(checksums) if checksums else "no checksum is published"
        self.found[name] = {"path": str(path), "bytes": path.stat().st_size, "sha256": digest, "checked": checked}
        return path

    def _downloaded(self, name, checksums):
        urls = self.corpus.urls
        if not urls:
            path = self.raw_dir / name if self.raw_dir else name
            raise UserError(f"{path}: no such file; --raw-dir names the folder of the recipe's files")
        if self.raw_dir is not None:
            raise UserError(f"{self.raw_dir}: has no {name}; without --raw-dir it is downloaded")
        path = self.download_dir / self.recipe.corpus / name
        if path.is_file() and (not checksums or matches(path, checksums)):
            print(f"{name}: reused {path}")
            return path
        download([f"{url.rstrip('/')}/{name}" for url in urls], path, checksums)
        return path
