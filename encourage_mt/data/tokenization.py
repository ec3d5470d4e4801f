"""Tokenize and detokenize as Moses does: exactly like sacremoses, but fast, with a cache of words."""

import functools
import re

import regex
from sacremoses import MosesDetokenizer, MosesPunctNormalizer, MosesTokenizer

CACHED_WORDS = 2**16  # of each kind; about 30 MB
FIRST, LAST = 1, 2  # flags of a word's position: some rules look at the ends of a line


class _WithinWords(MosesTokenizer):
    """Applies the rules of sacremoses that look only at a word and the spaces around it."""

    def handles_nonbreaking_prefixes(self, text):
        return text

    def restore_multidots(self, text):
        return text


class Tokenizer:
    """Callable that turns a line into tokens joined by spaces, XML-escaped, exactly as sacremoses does.

    Every rule of sacremoses, except the one for full stops, sees one character to the left and to the right of what it
    changes. So the tokens of a word depend only on the word, and on whether it begins or ends the line, and can be
    cached. Three exceptions look further: an apostrophe at the end of a word and one at the start of the next share the
    space between them, control characters vanish, and a final .' leaves spaces. Lines with those go through sacremoses
    itself.

    aggressive_hyphens: split a-b into a @-@ b.
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
        last, position = len(out) - 1, -1
        for _ in range(out.count(None)):
            position = out.index(None, position + 1)
            ends = (position == 0) * FIRST | (position == last) * LAST
            text, tokens, has_full_stop = self._word(words[position], ends)
            if has_full_stop:
                after = position + 1
                next_tokens = self._word(words[after], (after == last) * LAST)[1] if position < last else [""]
                text = self._full_stops(tokens, next_tokens[0][:1])
            out[position] = text
        return " ".join(out)

    def _tokenize_middle(self, word):
        """Return the text of a word inside a line, or None if it depends on the next word."""
        text, _, has_full_stop = self._word(word, 0)
        return None if has_full_stop else text

    def _tokenize_word(self, word, ends):
        """Return (text if no full stop is split off, tokens before escaping, whether a token ends with a full stop)."""
        if "MULTI" not in word:  # sacremoses writes dots as MULTI for a while
            if self._alnum.issuperset(word):
                return word, (word,), False
            letters = word.rstrip(_TAIL)
            if len(letters) > 1 and self._alpha.issuperset(letters):  # to the rules, one letter is like another
                _, (first, *others), _ = self._word("x" + word[len(letters) :], ends)
                return self._entry((letters + first[1:], *others))
        context = f"{'' if ends & FIRST else 'x '}{word}{'' if ends & LAST else ' x'}"
        tokens = self._within.tokenize(context, escape=False, **self._options)
        return self._entry(tuple(tokens[not ends & FIRST : len(tokens) - (not ends & LAST)]))

    def _entry(self, tokens):
        return " ".join(map(self._finish, tokens)), tokens, any(len(t) > 1 and t[-1] == "." for t in tokens)

    def _split_full_stops(self, tokens, following):
        """Return the tokens of a word as text, with full stops split off as handles_nonbreaking_prefixes does.

        following: the first character of the next word's tokens, empty at the end of the line.
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
    """Callable that simplifies punctuation, as normalize-punctuation.perl and remove-non-printing-char.perl do."""

    def __init__(self, language: str):
        rules = MosesPunctNormalizer(language, perl_parity=True).substitutions
        self._rules = [(re.compile(pattern), substitution) for pattern, substitution in rules]

    def __call__(self, line: str) -> str:
        if _NORMALIZABLE.search(line):
            for pattern, substitution in self._rules:
                line = pattern.sub(substitution, line)
        # Moses replaces them by a space, sacremoses deletes them
        return _NOT_PRINTING.sub(" ", line.strip())


_NORMALIZABLE = re.compile("[\r()`„“”–—´‘‚’…«»\u00a0\"]|  | [%:;]|''")  # every rule needs one of these to match
_NOT_PRINTING = regex.compile(r"\p{C}")


def detokenize(lines: list[str], language: str) -> list[str]:
    """Return plain text from Moses tokens: punctuation joined to its words, @-@ and XML escapes undone."""
    detokenizer = MosesDetokenizer(language)
    return [detokenizer.detokenize(line.split()) for line in lines]
