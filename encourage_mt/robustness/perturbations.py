"""Perturb sentences, reproducibly: characters, words, case, diacritics, punctuation, and total noise.

Swapped letters and neighbouring keys follow Belinkov and Bisk (2018, "Synthetic and natural noise both break neural
machine translation"), who do not swap the first and the last letter; dropped and doubled letters are two other common
errors of typing. A rate is the probability that a word is changed, if it can be: a number has no letters to change.
Letters that are not on an English keyboard have no neighbours. Spaces are kept, including non-breaking ones.
"""

import random
import re
import unicodedata
from collections.abc import Callable
from functools import partial

ATTACKS = 8
KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
KEYS = {key: (row, column + row / 2) for row, keys in enumerate(KEYBOARD) for column, key in enumerate(keys)}
NEIGHBOURS = {
    key: [other for other, (y, x) in KEYS.items() if other != key and abs(y - row) <= 1 and abs(x - column) <= 1]
    for key, (row, column) in KEYS.items()
}
Perturbation = Callable[[str, random.Random], str]


def swapped(word: str) -> list[str]:
    """Return all words that differ from `word` by the exchange of two neighbouring letters."""
    places = [i for i in range(len(word) - 1) if word[i : i + 2].isalpha() and word[i] != word[i + 1]]
    return [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in places]


def dropped(word: str) -> list[str]:
    """Return all words that lack one letter of `word`; none if it has only one."""
    places = [i for i, letter in enumerate(word) if letter.isalpha()]
    return [word[:i] + word[i + 1 :] for i in places] if len(places) > 1 else []


def doubled(word: str) -> list[str]:
    """Return all words in which one letter of `word` is repeated."""
    return [word[:i] + letter + word[i:] for i, letter in enumerate(word) if letter.isalpha()]


def keyboard(word: str) -> list[str]:
    """Return all words in which one letter of `word` is replaced by a neighbour on the keyboard."""
    return [
        word[:i] + (key.upper() if letter.isupper() else key) + word[i + 1 :]
        for i, letter in enumerate(word)
        for key in NEIGHBOURS.get(letter.lower(), ())
    ]


CHARACTER_ERRORS = {
    **{"swapped characters": swapped, "dropped characters": dropped},
    **{"doubled characters": doubled, "neighbouring keys": keyboard},
}


def change_words(variants: Callable[[str], list[str]], rate: float) -> Perturbation:
    """Return a perturbation that replaces each word, with probability `rate`, by one of its variants."""

    def change(match, rng):
        options = variants(match[0]) if rng.random() < rate else []
        return rng.choice(options) if options else match[0]

    return lambda line, rng: re.sub(r"\S+", lambda match: change(match, rng), line)


def drop_words(rate: float) -> Perturbation:
    return lambda line, rng: re.sub(r"\S+\s*", lambda match: match[0] if rng.random() >= rate else "", line)


def shuffle_words(line: str, rng: random.Random) -> str:
    words = line.split()
    rng.shuffle(words)
    return " ".join(words)


def remove_diacritics(line: str, rng: random.Random) -> str:
    letters = unicodedata.normalize("NFD", line)
    return unicodedata.normalize("NFC", "".join(char for char in letters if not unicodedata.combining(char)))


def remove_punctuation(line: str, rng: random.Random) -> str:
    return " ".join("".join(char for char in line if unicodedata.category(char)[0] != "P").split())


def total_noise(line: str, rng: random.Random) -> str:
    """Replace each letter and digit by a random letter."""
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") if char.isalnum() else char for char in line)


def attack(line: str, rng: random.Random) -> str:
    """Change one character of one random word, if a word can be changed."""
    words = list(re.finditer(r"\S+", line))
    for word in rng.sample(words, len(words)):
        variants = [rng.choice(options) for make in CHARACTER_ERRORS.values() if (options := make(word[0]))]
        if variants:
            return line[: word.start()] + rng.choice(variants) + line[word.end() :]
    return line


def perturbations(percentages: list[int]) -> dict[str, Perturbation]:
    """Return {name: perturbation}: those of characters and words with each percentage of the words, then the others."""
    kinds: dict[str, Callable[[float], Perturbation]]
    kinds = {name: partial(change_words, variants) for name, variants in CHARACTER_ERRORS.items()}
    kinds |= {"dropped words": drop_words, "repeated words": partial(change_words, lambda word: [f"{word} {word}"])}
    return {
        **{
            f"{kind} {percent}%": kinds[kind](percent / 100)
            for kind in sorted(kinds)
            for percent in sorted(percentages)
        },
        "no diacritics": remove_diacritics,
        "lower case": lambda line, rng: line.lower(),
        "upper case": lambda line, rng: line.upper(),
        "no punctuation": remove_punctuation,
        **{f"attack {number}": attack for number in range(1, ATTACKS + 1)},
        "total noise": total_noise,
    }


def perturb(lines: list[str], perturbation: Perturbation, name: str, seed: int) -> list[str]:
    """Return the perturbed lines. A line depends on `name`, `seed` and its own number, and never becomes empty."""
    return [
        perturbation(line, random.Random(f"{seed} {name} {number}")).strip() or line
        for number, line in enumerate(lines)
    ]
