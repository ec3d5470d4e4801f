"""Moses tokenization, as sacremoses does it."""

from sacremoses import MosesDetokenizer


def detokenize(lines: "list[str]", language: str) -> "list[str]":
    """Lines of Moses-tokenized text as plain text, escaping undone."""
    moses = MosesDetokenizer(lang=language)
    return [moses.detokenize(line.split()) for line in lines]
