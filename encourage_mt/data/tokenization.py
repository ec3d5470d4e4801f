"""Moses tokenization, exactly as sacremoses does it but word by word from a cache, and its undoing."""

import functools
import re

import regex
from sacremoses import MosesDetokenizer, MosesPunctNormalizer, MosesTokenizer

CACHED_WORDS = 2**16  # of each kind; about 30 MB
FIRST, LAST = 1, 2  # a word's place in its line: some rules look at the ends


class _WithinWords(MosesTokenizer):
    """The rules of sacremoses that look no further than a word and the spaces around it."""

    def handles_nonbreaking_prefixes(self, text):
        return text

    def restore_multidots(self, text):
        return text


class Tokenizer:
    """line -> tokens joined by spaces, XML-escaped; equal to sacremoses' MosesTokenizer(language) for every line.

    Each of sacremoses' rules but the one of full stops sees one character left and right of what it changes, so the
    tokens of a word follow from the word and from whether it begins or ends the line. Three things reach further: an
    apostrophe at the end of a word and one at the start of the next share the space between them, control characters
    vanish, and a final .' leaves spaces. Lines with those go through sacremoses itself.
    aggressive_hyphens splits a-b into a @-@ b.
    """

    def __init__(self, language: str, aggressive_hyphens: bool = False):
        self._options = {"aggressive_dash_splits": aggressive_hyphens}
        self._whole, self._within = MosesTokenizer(language), _WithinWords(language)
        self._numeric_only = set(self._whole.NUMERIC_ONLY_PREFIXES)
        self._nonbreaking = set(self._whole.NONBREAKING_PREFIXES) - self._numeric_only
        self._alpha, self._lower = set(self._whole.IsAlpha), set(self._whole.IsLower)
        self._alnum = set(self._whole.IsAlnum)
        self._word = functools.lru_cache(CACHED_WORDS)(self._tokenize_word)
        self._middle = functools.lru_cache(CACHED_WORDS)(self._tokenize_middle)
        self._full_stops = functools.lru_cache(CACHED_WORDS)(self._split_full_stops)

    def __call__(self, line: str) -> str:
        if ("'" in line or not line.isprintable()) and _ACROSS_WORDS.search(line):
            return self._whole.tokenize(line, return_str=True, **self._options)
        words = line.split()
        if not words:
            return ""
        out = list(map(self._middle, words))
        out[0] = out[-1] = None
        last, place = len(out) - 1, -1
        for _ in range(out.count(None)):
            place = out.index(None, place + 1)
            text, tokens, has_full_stop = self._word(words[place], (place == 0) * FIRST | (place == last) * LAST)
            if has_full_stop:
                after = place + 1
                following = self._word(words[after], (after == last) * LAST)[1][0][0] if place < last else ""
                text = self._full_stops(tokens, following)
            out[place] = text
        return " ".join(out)

    def _tokenize_middle(self, word):
        """The text of a word that is neither first nor last, or None if what follows has to be looked at."""
        text, _, has_full_stop = self._word(word, 0)
        return None if has_full_stop else text

    def _tokenize_word(self, word, place):
        """(text if no full stop is split off, tokens before escaping, whether a token ends with a full stop)."""
        if "MULTI" not in word:  # which stands for dots
            if self._alnum.issuperset(word):
                return word, (word,), False
            letters = word.rstrip(_TAIL)
            if len(letters) > 1 and self._alpha.issuperset(letters):  # to what follows, one letter is like another
                _, (first, *others), _ = self._word("x" + word[len(letters) :], place)
                return self._entry((letters + first[1:], *others))
        context = f"{'' if place & FIRST else 'x '}{word}{'' if place & LAST else ' x'}"
        tokens = self._within.tokenize(context, escape=False, **self._options)
        return self._entry(tuple(tokens[not place & FIRST : len(tokens) - (not place & LAST)]))

    def _entry(self, tokens):
        return " ".join(map(self._finish, tokens)), tokens, any(len(t) > 1 and t[-1] == "." for t in tokens)

    def _split_full_stops(self, tokens, following):
        """The tokens of a word as text, full stops split off as handles_nonbreaking_prefixes does.

        following is the first character after the word, empty at the end of the line.
        """
        out = []
        for token, after in zip(tokens, [*(t[0] for t in tokens[1:]), following], strict=True):
            prefix = token[:-1]
            if (
                not prefix
                or token[-1] != "."
                or ("." in prefix and not self._alpha.isdisjoint(prefix))
                or prefix in self._nonbreaking
                or after in self._lower
                or (prefix in self._numeric_only and after in _DIGITS)
            ):
                out.append(self._finish(token))
            else:
                out.append(f"{self._finish(prefix)} .")
        return " ".join(out)

    def _finish(self, token):
        return self._whole.escape_xml(self._whole.restore_multidots(token))


_ACROSS_WORDS = re.compile(r"[\x00-\x08\x0e-\x1b]|'\s+'|\.'\s*$")
_DIGITS = set("0123456789")
_TAIL = ',.;:?!"”“)'


class PunctuationNormalizer:
    """line -> line with plain punctuation: normalize-punctuation.perl, then remove-non-printing-char.perl."""

    def __init__(self, language: str):
        rules = MosesPunctNormalizer(language, perl_parity=True).substitutions
        self._rules = [(re.compile(pattern), substitution) for pattern, substitution in rules]

    def __call__(self, line: str) -> str:
        if _NORMALIZABLE.search(line):
            for pattern, substitution in self._rules:
                line = pattern.sub(substitution, line)
        # Moses puts a space where sacremoses puts nothing
        return _NOT_PRINTING.sub(" ", line.strip())


_NORMALIZABLE = re.compile("[\r()`„“”–—´‘‚’…«»\u00a0\"]|  | [%:;]|''")  # what any of the rules needs to match
_NOT_PRINTING = regex.compile(r"\p{C}")

tokenizer = functools.cache(Tokenizer)


def tokenize(lines: list[str], language: str, aggressive_hyphens: bool = False) -> list[str]:
    """Moses tokens of each line, joined by spaces, XML-escaped."""
    return [tokenizer(language, aggressive_hyphens)(line) for line in lines]


def detokenize(lines: list[str], language: str) -> list[str]:
    """Plain text from Moses tokens: punctuation joined to its words, @-@ and XML escapes undone."""
    detokenizer = MosesDetokenizer(language)
    return [detokenizer.detokenize(line.split()) for line in lines]
