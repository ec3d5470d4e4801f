"""Find the files a recipe names: in a local folder, downloaded before, or downloaded now; alone or in archives."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import UserError
from ..files import file_hash
from ..recipe import Corpus, Recipe
from .archives import extract
from .download import download, is_html, matches
from .manifest import hash_text


@dataclass
class Sources:
    """Finds the files that a recipe names as "FILE" or "ARCHIVE:MEMBER".

    With `raw_dir`, a file is taken from this folder or from its subfolder named after the recipe or its corpus.
    Otherwise it is taken from `download_dir`, and downloaded first if it is not there; a recipe without addresses has
    its files beside it. In place of an archive that is not in `raw_dir`, its extracted files are accepted.

    `used` records the files: {name: {"path", "bytes", "sha256", "checked"}}.
    """

    recipe: Recipe
    raw_dir: Path | None
    download_dir: Path

    def __post_init__(self):
        self.used = {}
        self.corpus = self.recipe.data[0]
        if self.raw_dir is not None and not self.raw_dir.is_dir():
            raise UserError(f"{self.raw_dir}: no such folder")

    def find_local(self, name: str, corpus: Corpus | None = None) -> Path | None:
        """Return the path of a file of `corpus` (default: the one that was chosen) that needs no download, or None."""
        if self.raw_dir:
            folders = [self.raw_dir, self.raw_dir / self.recipe.name, self.raw_dir / self.recipe.corpus]
            paths = [folder / relative for folder in folders for relative in (name, PurePosixPath(name).name)]
        else:
            paths = [] if (corpus or self.corpus).urls else [self.recipe.folder / name]
        return next((path for path in paths if path.is_file()), None)

    def choose(self) -> Corpus:
        """Choose the first alternative of the recipe's data whose files are all found locally, otherwise the first."""

        self.corpus = next(filter(self.is_local, self.recipe.data), self.recipe.data[0])
        return self.corpus

    def is_local(self, corpus: Corpus) -> bool:
        """Return whether all files of `corpus` are found without a download."""
        return all(any(self.find_local(part, corpus) for part in name.split(":", 1)) for name in corpus.names)

    def collect(self, names: list[str], extracted: Path) -> dict[str, Path]:
        """Return {name: path} for names as the recipe has them; members of archives are extracted below `extracted`.

        Raises UserError if a file is not found, is not the published one, or is an archive that is refused.
        """
        paths: dict[str, Path] = {}
        members: dict[str, list[str]] = {}
        for name in dict.fromkeys(names):
            whole = self.find_local(name)
            # a file with a colon in its name, not a member beside its archive
            is_file = whole is not None and whole.as_posix().endswith(PurePosixPath(name).as_posix())
            archive, _, member = (name, "", "") if is_file else name.partition(":")
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
        if name in self.used:
            return Path(self.used[name]["path"])
        checksums = self.corpus.checksums.get(name, [])
        path = self.find_local(name)
        if path is None:
            path = self._downloaded(name, checksums)
        elif is_html(path):
            raise UserError(f"{path}: is a web page; download {path.name} again")
        elif checksums and not matches(path, checksums):
            raise UserError(f"{path}: is not the published file ({' or '.join(checksums)}); download it again")
        digest = file_hash(path)
        checked = " or ".join(checksums) if checksums else "no checksum is published"
        if self.corpus.urls and not checksums:
            print(f"{name}: no checksum in the recipe; to accept only this file from now on, add sha256:{digest}")
        self.used[name] = {"path": str(path), "bytes": path.stat().st_size, "sha256": digest, "checked": checked}
        return path

    def _downloaded(self, name, checksums):
        urls = self.corpus.urls
        if not urls:
            path = (self.raw_dir or self.recipe.folder) / name
            raise UserError(f"{path}: no such file; use --raw-dir to name the folder of the recipe's files")
        if self.raw_dir is not None:
            raise UserError(f"{self.raw_dir}: has no {name}; without --raw-dir it is downloaded")
        folder = self.recipe.corpus
        if not checksums:  # otherwise a file of another recipe that has the same names would be taken for this one
            folder += f".{hash_text(urls)[:8]}"
        path = self.download_dir / folder / name
        if path.is_file() and (not checksums or matches(path, checksums)):
            print(f"{name}: reused {path}")
            return path
        download([f"{url.rstrip('/')}/{name}" for url in urls], path, checksums)
        return path
