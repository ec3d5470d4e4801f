"""Read and write model.json, the record of an exported model: how it prepares text and searches, and its files."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, JsonValue

from ..data.manifest import PreparedData
from ..data.stages import Preparation
from ..errors import UserError, as_user_error
from ..fields import SHA256, Count, Language, Name
from ..files import Record, file_hash, read_record, write_record

RECORD, CARD = "model.json", "README.md"
AGAIN = "export the run again"


def preparation_of(data: PreparedData, split: str) -> Preparation:
    """Return how valid or a test set of `data` was prepared: like train only if it was held out of it."""
    corpora: Any = data.options.get("data", [])
    key = "valid_every" if split == "valid" else ""
    with as_user_error(f"{data.folder / 'manifest.json'}: options: cannot be read"):
        holds_out = any(split in corpus.get("held_out", {}) or corpus.get(key) for corpus in corpora)
        like_train = holds_out and bool(data.counts["train"].get("held_out"))  # not if another alternative was used
        return Preparation.of({**data.options, "tokenizer": data.tokenizer, "lowercase": data.lowercase}, like_train)


class Agreement(Record):
    """How the exported model and fairseq translated the same sentences of valid, with the model's beam.

    identical: sentences whose translations are the same; required: what an export must reach, in words; signature: of
    both BLEU scores.
    """

    sentences: Count
    identical: Count
    required: str
    bleu_fairseq: float
    bleu_ctranslate2: float
    signature: str

    @property
    def share(self) -> float:
        return self.identical / self.sentences

    def describe(self) -> str:
        """Return one line for people."""
        return (
            f"{self.identical} of {self.sentences} sentences of valid are translated as by fairseq ({self.share:.1%}), "
            f"sacreBLEU {self.bleu_ctranslate2:.2f}, fairseq {self.bleu_fairseq:.2f} ({self.signature}); "
            f"required: {self.required}"
        )


class Model(Record):
    """The content of model.json, and its folder, which also has a CTranslate2 model, a subword model and a model card.

    subword has the recipe's options of the subword model. beam and lenpen are those the run was scored with.
    checkpoint_sha256 is of the averaged checkpoint that was converted; files is {name: sha256} of the other files,
    except the card.
    """

    remedy: ClassVar[str] = f"{AGAIN} with this version"

    format: Literal[1] = 1
    folder: Path = Field(exclude=True)
    name: str
    recipe: str
    source: Language
    target: Language
    preparation: Preparation
    subword: dict[str, JsonValue]
    remove_bpe: Literal["@@ ", "sentencepiece"]
    byte_fallback: bool
    beam: int = Field(ge=1, lt=2**31)
    lenpen: float
    quantization: str
    agreement: Agreement | None = None  # None until it is checked, in `export`
    checkpoint_sha256: SHA256
    files: dict[Name, SHA256]
    versions: dict[str, str]

    @classmethod
    def open(cls, folder: Path) -> "Model":
        """Return the model in `folder`.

        Raises UserError if it is not an export, another version wrote it, or a file is missing or was changed.
        """
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        if not (folder / RECORD).exists():
            raise UserError(f"{folder}: not a model that `encourage-mt export` made (it has no {RECORD})")
        model = read_record(folder / RECORD, cls, folder=folder)
        for name, checksum in model.files.items():
            path = folder / name
            if not path.is_file():
                raise UserError(f"{path}: is missing; {AGAIN}")
            if file_hash(path) != checksum:
                raise UserError(f"{path}: has changed since the export (its checksum differs); {AGAIN}")
        return model

    def write(self) -> None:
        """Write model.json into the folder."""
        write_record(self.folder / RECORD, self)
