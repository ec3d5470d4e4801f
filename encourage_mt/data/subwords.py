"""Learn and apply subword models: SentencePiece, or subword-nmt for published pipelines whose merges must match."""

import functools
import io
import random
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr
from itertools import chain, islice
from pathlib import Path

import sentencepiece
from subword_nmt import apply_bpe, learn_bpe

from ..errors import UserError, as_user_error
from ..files import atomic_write

SAMPLED_LINES = 4_000_000  # SentencePiece keeps all lines it learns from in memory
CACHED_WORDS = 2**16
SAMPLING = 0.1


def learn(pairs: Iterable[tuple[str, str]], count: int, options: dict, prefix: Path) -> int:
    """Learn a joint model on both sides of `count` pairs, and write it.

    With options {"merges": N}, subword-nmt learns from all lines; this writes `prefix`.codes. Other options are those
    of SentencePiece's trainer, which learns from every k-th pair, at most SAMPLED_LINES lines; this writes
    `prefix`.model and `prefix`.vocab. Returns the number of lines, without those that SentencePiece skips because they
    are longer than max_sentence_length. Raises UserError if learning fails.
    """
    if "merges" in options:
        lines = (line for pair in pairs for line in pair)
        with atomic_write(Path(f"{prefix}.codes")) as codes:
            try:
                learn_bpe.learn_bpe(lines, codes, options["merges"])
            except ValueError:  # it takes the maximum over no pairs of characters
                raise UserError("subword model: every word of the training set has only one character") from None
        return 2 * count
    step = -(-2 * count // SAMPLED_LINES)
    limit, learned = options.get("max_sentence_length", 4192), 0

    def counted() -> Iterator[str]:
        nonlocal learned
        for line in chain.from_iterable(islice(pairs, 0, None, step)):
            learned += len(line.encode()) <= limit
            yield line

    proto = io.BytesIO()  # SentencePiece itself would not notice that it cannot write its file
    with as_user_error("subword model: cannot be learned"):
        options = {"character_coverage": 1.0, "minloglevel": 2, **options}
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=counted(), model_writer=proto, **options)
    with atomic_write(Path(f"{prefix}.model"), "wb") as file:
        file.write(proto.getvalue())
    model = sentencepiece.SentencePieceProcessor(model_proto=proto.getvalue())
    with atomic_write(Path(f"{prefix}.vocab")) as file:
        file.writelines(f"{model.id_to_piece(i)}\t{model.get_score(i):g}\n" for i in range(model.get_piece_size()))
    return learned


def _load_sentencepiece(prefix: Path) -> sentencepiece.SentencePieceProcessor:
    """Return the model that `learn` wrote. Raises UserError if it is damaged."""
    with as_user_error(f"{prefix}.model: not a SentencePiece model"):
        return sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")


def _load_bpe(prefix: Path) -> apply_bpe.BPE:
    """Return the merges that `learn` wrote. Raises UserError if they are damaged."""
    path, messages = Path(f"{prefix}.codes"), io.StringIO()
    with as_user_error(f"{path}: not merges of subword-nmt"), open(path, encoding="utf-8", newline="\n") as codes:
        try:
            with redirect_stderr(messages):
                return apply_bpe.BPE(codes)
        except SystemExit:
            raise ValueError(messages.getvalue()) from None


def encoder(options: dict, prefix: Path) -> Callable[[str], str]:
    """Return a function that splits text into pieces joined by spaces, with the model that `learn` wrote."""
    if "merges" not in options:
        encode = _load_sentencepiece(prefix).encode
        return lambda line: " ".join(encode(line, out_type=str))
    bpe = _load_bpe(prefix)

    @functools.lru_cache(CACHED_WORDS)
    def segment(word: str) -> str:
        bpe.cache.clear()  # it would grow without limit
        return bpe.segment(word)

    return lambda line: " ".join(map(segment, line.split()))


def sample(lines: list[str], prefix: Path, seed: int) -> list[str] | None:
    """Return lines in pieces that are drawn at random; None if the model has only one way to split a word.

    BPE leaves out each merge with probability SAMPLING (Provilkov et al. 2020, BPE-dropout); a unigram model draws
    segmentations with their probabilities to the power of SAMPLING (Kudo 2018).
    """
    if Path(f"{prefix}.codes").exists():
        bpe = _load_bpe(prefix)
        state = random.getstate()
        random.seed(seed)  # subword-nmt uses the generator of the process
        sampled = [bpe.segment(line, SAMPLING) for line in lines]
        random.setstate(state)
        return sampled
    model = _load_sentencepiece(prefix)
    sentencepiece.set_random_generator_seed(seed)
    try:
        return [" ".join(model.encode(line, out_type=str, enable_sampling=True, alpha=SAMPLING)) for line in lines]
    except RuntimeError:  # a model of characters or words
        return None


def pieces(prefix: Path) -> Iterator[str]:
    """Yield the pieces of a SentencePiece model that encoded text can contain: all except <unk> and control pieces."""
    model = _load_sentencepiece(prefix)
    for index in range(model.get_piece_size()):
        if not (model.is_unknown(index) or model.is_control(index)):
            yield model.id_to_piece(index)


def join_pieces(pieces: list[str], remove_bpe: str) -> str:
    """Return the text of a line in pieces, as fairseq's --remove-bpe does; "@@ " is the mark of subword-nmt."""
    if remove_bpe == "sentencepiece":
        return "".join(pieces).replace("\u2581", " ").strip()
    return " ".join([*pieces, ""]).replace(remove_bpe, "").rstrip()


def restore_bytes(line: str) -> str:
    """Return text in which byte pieces are characters again: <0xE2><0x82><0xAC> becomes the euro sign.

    --remove-bpe sentencepiece leaves byte pieces as they are. Bytes that are not UTF-8 become U+FFFD, line ends spaces.
    """
    return _BYTES.sub(_decode_bytes, line)


def _decode_bytes(run):
    text = bytes.fromhex(re.sub("<0x|>", "", run.group())).decode(errors="replace")
    return re.sub("[\r\n]", " ", text)  # a line must stay one line


_BYTES = re.compile(r"(?:<0x[0-9A-F]{2}>)+")
