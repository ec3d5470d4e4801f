"""Score text against references: sacreBLEU, chrF++, TER, each with its signature; BLEU of tokenized text; COMET."""

import math
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sacrebleu.metrics import BLEU, CHRF, TER

from ..errors import UserError
from ..files import file_hash
from .results import Score

THREE_LETTERS = {"zho": "zh", "cmn": "zh", "jpn": "ja", "kor": "ko"}


def metrics(language: str, lowercase: bool = False) -> dict[str, Any]:
    """Return sacreBLEU, chrF++ and TER for detokenized text in `language` (a code such as de, zh, zh_CN or zho_Hans).

    BLEU tokenizes as sacreBLEU advises for the language: zh, ja-mecab, ko-mecab, otherwise 13a. TER splits Chinese and
    Japanese into characters. With `lowercase`, for lowercased data, all ignore case; TER always does, like the
    sacrebleu command. Raises UserError if the tokenizer's package is missing.
    """
    code = language.replace("-", "_").split("_")[0].lower()
    code = THREE_LETTERS.get(code, code)
    try:
        bleu = BLEU(lowercase=lowercase, trg_lang=code)
    except (ImportError, RuntimeError):
        raise UserError(
            f"BLEU for {language} needs a tokenizer that is not installed: pip install 'sacrebleu[{code}]'"
        ) from None
    characters = code in ("zh", "ja")
    return {
        "sacreBLEU": bleu,
        "chrF++": CHRF(word_order=2, lowercase=lowercase),
        "TER": TER(normalized=characters, asian_support=characters),
    }


def score(hypotheses: list[str], references: list[str], language: str, lowercase: bool = False) -> dict[str, Score]:
    """Return {metric: Score} of detokenized text.

    Raises UserError if the sides differ in length, all hypotheses are empty, or a reference contains <<unk>>.
    """
    check(hypotheses, references)
    return {
        name: _corpus_score(metric, hypotheses, references) for name, metric in metrics(language, lowercase).items()
    }


def tokenized_bleu(hypotheses: list[str], references: list[str]) -> Score:
    """Return BLEU of tokenized text, as in fairseq-generate and the paper's table.

    It depends on the tokenizer and cannot be compared with sacreBLEU of detokenized text. Same value as
    `sacrebleu --tokenize none --force`. Raises UserError as `score` does.
    """
    check(hypotheses, references)
    return _corpus_score(BLEU(tokenize="none", force=True), hypotheses, references)


def comet(model: Path, sources: list[str], hypotheses: list[str], references: list[str], gpus: int) -> Score:
    """Return 100 times COMET (Rei et al. 2020) of a model on disk, a .ckpt of unbabel-comet with its hparams.yaml.

    Nothing is downloaded. Raises UserError if the package or the model is missing, or the score is not a number.
    """
    signature = comet_signature(model)
    from comet import load_from_checkpoint

    rows = [{"src": s, "mt": h, "ref": r} for s, h, r in zip(sources, hypotheses, references, strict=True)]
    value = float(load_from_checkpoint(str(model)).predict(rows, batch_size=16, gpus=gpus).system_score)
    return _checked("COMET", 100 * value, signature)


def comet_signature(model: Path) -> str:
    """Return the package's version, the model's name and digest. Raises UserError if package or model is missing."""
    try:
        package = version("unbabel-comet")
    except PackageNotFoundError:
        raise UserError("--comet needs the package unbabel-comet: pip install unbabel-comet") from None
    if not model.is_file():
        raise UserError(f"{model}: no such COMET model (a .ckpt file)")
    return f"unbabel-comet:{package}|model:{model.name}|sha256:{file_hash(model)[:12]}|scale:100"


def check(hypotheses: list[str], references: list[str]) -> None:
    """Raise UserError if the hypotheses cannot be scored against the references."""
    if len(hypotheses) != len(references):
        raise UserError(f"{len(hypotheses)} hypotheses for {len(references)} references: each line needs one")
    if not any(line.strip() for line in hypotheses):
        raise UserError("the hypotheses are empty")
    for number, line in enumerate(references, 1):
        if "<<unk>>" in line:
            raise UserError(
                f"reference line {number} contains <<unk>>: it comes from fairseq-generate's T- lines; score against "
                "the text that was binarized"
            )


def _corpus_score(metric, hypotheses, references):
    result = metric.corpus_score(hypotheses, [references])
    ratio = result.ratio if isinstance(metric, BLEU) else None
    return _checked(result.name, result.score, str(metric.get_signature()), ratio)


def _checked(name, value, signature, ratio=None):
    if not math.isfinite(value):
        raise UserError(f"{name} is not a number")
    return Score(score=value, signature=signature, length_ratio=ratio)
