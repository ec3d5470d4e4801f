"""Write the toy corpus, German-English pairs made by a grammar: python examples/bundled_de_en/grammar.py.

Pairs are hard to translate because of gender and case (Den Hund sieht der Mann), verb-second and verb-final order,
separable verbs (holt ... ab, but abholt at the end), participles at the end, German numbers (units before tens), names.
Some pairs of words (verb and object, adjective and noun, tens and units) are held out: no sentence of train contains
both words of such a pair, and every sentence of valid and test has at least one such pair together.
"""

import gzip
import itertools
import random
from dataclasses import dataclass, field
from pathlib import Path

from lexicon import (
    ADJECTIVES,
    ANIMATES,
    CONJUNCTIONS,
    DEFINITE,
    EIN_ENDINGS,
    GIVEN_NAMES,
    MODALS,
    PLACES,
    POSSESSIVES,
    PRONOUNS,
    SURNAMES,
    TEENS,
    TENS,
    THINGS,
    TIMES,
    UNITS,
    VERBS,
)


def _table(text):
    return [tuple(entry.split()) for line in text.split("\n") for entry in line.split(";") if entry.strip()]


def _zipf(rng, items):
    """Return one of `items`, the first ones more often, as in a natural language."""
    return rng.choices(items, weights=[1 / (rank + 4) for rank in range(len(items))])[0]


@dataclass
class NounPhrase:
    de: dict  # case -> words
    en: str
    en_object: str
    person: str  # I, he or they: what the verb agrees with
    gender: str = ""  # m, f, n or pl, where a relative clause may follow
    noun: str = ""
    pairs: list = field(default_factory=list)


@dataclass
class Clause:
    """A verb and its phrases, before their order is chosen."""

    subject: NounPhrase
    verb: tuple
    tense: str  # present, past or modal
    modal: tuple
    objects: list  # [(NounPhrase, German words, whether it may be first)]
    en_objects: str
    time: tuple
    place: tuple
    negative: bool
    pairs: list


class Grammar:
    """Draws pairs of sentences; `draw` returns (German, English, the held-out pairs of words in it)."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.animates, self.things = _table(ANIMATES), _table(THINGS)
        self.adjectives, self.verbs = _table(ADJECTIVES), _table(VERBS)
        self.modals, self.times, self.places = _table(MODALS), _table(TIMES), _table(PLACES)
        self.conjunctions = _table(CONJUNCTIONS)
        self.given_names, self.surnames = GIVEN_NAMES.split(), SURNAMES.split()
        self.units, self.teens, self.tens = (_table(text) for text in (UNITS, TEENS, TENS))

        nouns = [noun[0] for noun in self.animates + self.things]
        candidates = itertools.chain(
            itertools.product([verb[0] for verb in self.verbs], nouns),
            itertools.product([adjective[0] for adjective in self.adjectives], nouns),
            itertools.product([ten[0] for ten in self.tens], [unit[0] for unit in self.units]),
            itertools.product(["Herr", "Frau"], self.surnames),
        )
        draw = random.Random(seed)
        self.held_out = {pair for pair in candidates if draw.random() < 0.15}

    def maybe(self, probability: float) -> bool:
        return self.rng.random() < probability

    def draw(self) -> tuple[str, str, set]:
        kind = self.rng.choices(["main", "question", "subordinate", "fronted subordinate"], weights=[60, 12, 16, 12])[0]
        first = self.clause()
        if kind == "main":
            de, en = self.german_main(first), self.english(first)
        elif kind == "question":
            first.negative = False
            de, en = self.german_question(first), self.english_question(first)
        else:
            second = self.clause()
            conjunction_de, conjunction_en = self.rng.choice(self.conjunctions)
            final = f"{conjunction_de} {self.german_final(second)}"
            subordinate = f"{conjunction_en} {self.english(second)}"
            if kind == "subordinate":
                de, en = f"{self.german_main(first)}, {final}", f"{self.english(first)} {subordinate}"
            else:
                de, en = f"{final}, {self.german_question(first)}", f"{subordinate}, {self.english(first)}"
            first.pairs += second.pairs
        mark = "?" if kind == "question" else "."
        pairs = self.held_out.intersection(first.pairs)
        return de[0].upper() + de[1:] + mark, en[0].upper() + en[1:] + mark, pairs

    # --- words and phrases

    def number(self):
        kind = self.rng.random()
        if kind < 0.3:
            return *self.rng.choice(self.units), []
        if kind < 0.5:
            return *self.rng.choice(self.teens), []
        ten_de, ten_en = self.rng.choice(self.tens)
        if kind < 0.6:
            return ten_de, ten_en, []
        unit_de, unit_en = self.rng.choice(self.units)
        return f"{unit_de}und{ten_de}", f"{ten_en}-{unit_en}", [(ten_de, unit_de)]

    def noun_phrase(self, animate: bool, negative: bool = False) -> NounPhrase:
        if animate and not negative:
            kind = self.rng.random()
            if kind < 0.14:
                nom, acc, dat, en, en_object, person = self.rng.choice(PRONOUNS)
                return NounPhrase({"nom": nom, "acc": acc, "dat": dat}, en, en_object, person)
            if kind < 0.22:
                name = _zipf(self.rng, self.given_names)
                return NounPhrase(dict.fromkeys(DEFINITE, name), name, name, "he")
            if kind < 0.28:
                surname = self.rng.choice(self.surnames)
                title, en_title, forms = self.rng.choice(
                    [("Herr", "Mr", ("Herr", "Herrn", "Herrn")), ("Frau", "Ms", ("Frau",) * 3)]
                )
                de = {case: f"{form} {surname}" for case, form in zip(DEFINITE, forms, strict=True)}
                en = f"{en_title} {surname}"
                return NounPhrase(de, en, en, "he", pairs=[(title, surname)])
        return self.full_noun_phrase(animate, negative)

    def full_noun_phrase(self, animate, negative):
        singular, plural, gender, en = _zipf(self.rng, self.animates if animate else self.things)
        en_singular, _, en_plural = en.partition("/")
        en_plural = en_plural or en_singular + "s"
        determiner = (
            "kein"
            if negative
            else self.rng.choices(["der", "ein", "poss", "dieser", "number"], weights=[36, 24, 16, 8, 16])[0]
        )
        is_plural = determiner == "number" or (determiner not in ("ein", "kein") and self.maybe(0.25))
        slot = "pl" if is_plural else gender
        pairs = []
        adjective = None
        if self.maybe(0.4):
            adjective = _zipf(self.rng, self.adjectives)
            pairs.append((adjective[0], singular))
        if determiner == "number":
            number_de, number_en, number_pairs = self.number()
            pairs += number_pairs
        possessive = self.rng.choice(list(POSSESSIVES))

        de = {}
        for case in DEFINITE:
            weak = "en" if is_plural or case == "dat" or (case == "acc" and gender == "m") else "e"
            if determiner == "der":
                article, ending = DEFINITE[case][slot], weak
            elif determiner == "dieser":
                article = (
                    "dies" + {"der": "er", "die": "e", "das": "es", "den": "en", "dem": "em"}[DEFINITE[case][slot]]
                )
                ending = weak
            elif determiner == "number":
                article, ending = number_de, "en" if case == "dat" else "e"
            else:
                stem = possessive if determiner == "poss" else determiner
                article = stem + EIN_ENDINGS[case][slot]
                strong = {"m": "er", "n": "es"} if case == "nom" else {"n": "es"} if case == "acc" else {}
                ending = weak if is_plural else strong.get(gender, weak)
            noun = plural if is_plural else singular
            if is_plural and case == "dat" and noun[-1] not in "ns":
                noun += "n"
            words = [article, adjective[0].rstrip("e") + ending, noun] if adjective else [article, noun]
            de[case] = " ".join(words)

        body = " ".join(([adjective[1]] if adjective else []) + [en_plural if is_plural else en_singular])
        if determiner == "der":
            en = f"the {body}"
        elif determiner == "dieser":
            en = f"{'these' if is_plural else 'this'} {body}"
        elif determiner == "number":
            en = f"{number_en} {body}"
        elif determiner == "poss":
            en = f"{POSSESSIVES[possessive]} {body}"
        else:
            en = f"{'an' if body[0] in 'aeiou' else 'a'} {body}"
        person = "they" if is_plural else "he"
        return NounPhrase(de, en, en, person, slot, singular, pairs)

    def clause(self, relative_allowed=True) -> Clause:
        tense = self.rng.choices(["present", "past", "modal"], weights=[45, 35, 20])[0]
        verb = _zipf(self.rng, self.verbs)
        subject = self.noun_phrase(animate=True)
        government = verb[4]
        negative = government in ("thing", "person") and self.maybe(0.08)
        pairs = list(subject.pairs)
        objects, en_objects = [], ""

        def add(phrase, case, preposition=""):
            nonlocal en_objects
            pairs.extend(phrase.pairs)
            if phrase.noun:
                pairs.append((verb[0], phrase.noun))
            words = f"{preposition} {phrase.de[case]}".strip()
            # an object may be first only if its form shows that it is the object: masculine singular
            objects.append((phrase, words, phrase.gender == "m" and not preposition))
            en_objects += " " + phrase.en_object

        if government == "give":
            add(self.noun_phrase(animate=True), "dat")
            add(self.full_noun_phrase(animate=False, negative=False), "acc")
        elif government == "to":
            add(self.noun_phrase(animate=True), "dat")
        elif "+" in government:
            preposition, case = government.split("+")
            add(self.noun_phrase(animate=True), case, preposition)
        elif government != "none":
            add(self.noun_phrase(animate=government == "person", negative=negative), "acc")

        time = place = None
        if self.maybe(0.45):
            time_de, time_en, when = self.rng.choice(self.times)
            if when == "any" or (when == "past") == (tense == "past"):
                if "N" in time_de.split("_"):
                    number_de, number_en, number_pairs = self.number()
                    if "Uhr" in time_de:
                        number_de, number_en = self.rng.choice(self.units + self.teens[:3])
                        number_pairs = []
                    pairs += number_pairs
                    time_de = time_de.replace("_N_", f" {number_de} ")
                    time_en = time_en.replace("N_", f"{number_en} ")
                time = time_de.replace("_", " "), time_en.replace("_", " ")
        if self.maybe(0.3):
            place = tuple(words.replace("_", " ") for words in self.rng.choice(self.places))
        clause = Clause(
            subject, verb, tense, self.rng.choice(self.modals), objects, en_objects, time, place, negative, pairs
        )
        if relative_allowed and subject.gender and self.maybe(0.12):
            self.add_relative(clause)
        return clause

    def add_relative(self, clause):
        """Add a relative clause to the subject: der Mann, der ..., / the man who ..."""
        inner = self.clause(relative_allowed=False)
        subject = clause.subject
        inner.subject = NounPhrase({"nom": DEFINITE["nom"][subject.gender]}, "who", "", subject.person, subject.gender)
        relative_de = self.german_final(inner)
        subject.de = {"nom": f"{subject.de['nom']}, {relative_de},"}
        subject.en = f"{subject.en} {self.english(inner)}"
        clause.pairs += inner.pairs

    # --- German

    def german_verb(self, clause):
        """Return (finite verb, end of a main clause, verbs at the end of a verb-final clause)."""
        prefix, _, rest = clause.verb[0].rpartition("|")
        infinitive, he_form, participle = prefix + rest, clause.verb[1], clause.verb[2]
        person = clause.subject.person
        if clause.tense == "modal":
            finite = clause.modal[1] if person == "they" else clause.modal[0]
            return finite, infinitive, f"{infinitive} {finite}"
        if clause.tense == "past":
            forms = {"h": ("habe", "hat", "haben"), "s": ("bin", "ist", "sind")}[clause.verb[3]]
            finite = forms[("I", "he", "they").index(person)]
            return finite, participle, f"{participle} {finite}"
        finite = {"I": rest[:-2] + "e" if rest.endswith("en") else rest[:-1] + "e", "he": he_form, "they": rest}[person]
        return finite, prefix, prefix + finite

    def german_middle(self, clause, without=None):
        """Return the words between the two parts of the verb, in the usual order: pronouns, time, objects, place."""
        objects = [(phrase, words) for phrase, words, _ in clause.objects if words != without]
        pronouns = [
            words for phrase, words in objects if not phrase.noun and words == words.lower() and " " not in words
        ]
        others = [words for _, words in objects if words not in pronouns]
        time = [clause.time[0]] if clause.time and clause.time[0] != without else []
        place = [clause.place[0]] if clause.place else []
        return pronouns + time + others + place

    def german_main(self, clause):
        finite, end, _ = self.german_verb(clause)
        subject = clause.subject.de["nom"]
        first = subject
        movable = [words for _, words, may_stand_first in clause.objects if may_stand_first]
        if clause.time and self.maybe(0.5):
            first = clause.time[0]
        elif movable and subject.split()[0] != "sie" and self.maybe(0.25):
            first = movable[0]
        if first == subject:
            words = [subject, finite, *self.german_middle(clause), end]
        else:
            words = [first, finite, subject, *self.german_middle(clause, without=first), end]
        return _join(words)

    def german_question(self, clause):
        finite, end, _ = self.german_verb(clause)
        return _join([finite, clause.subject.de["nom"], *self.german_middle(clause), end])

    def german_final(self, clause):
        *_, cluster = self.german_verb(clause)
        return _join([clause.subject.de["nom"], *self.german_middle(clause), cluster])

    # --- English

    def english_tail(self, clause):
        return [clause.en_objects, clause.place[1] if clause.place else "", clause.time[1] if clause.time else ""]

    def english(self, clause):
        base, he_form, past = (form.replace("_", " ") for form in clause.verb[5:8])
        he = clause.subject.person == "he"
        if clause.tense == "modal":
            modal = clause.modal[3 if he else 2].replace("_", " ")
            if clause.negative:
                negated = {"can": "cannot", "want to": "do not want to", "wants to": "does not want to"}
                modal = negated.get(modal, f"{modal} not")
            verb = f"{modal} {base}"
        elif clause.negative:
            verb = f"{'did' if clause.tense == 'past' else 'does' if he else 'do'} not {base}"
        else:
            verb = past if clause.tense == "past" else he_form if he else base
        return _join([clause.subject.en, verb, *self.english_tail(clause)])

    def english_question(self, clause):
        base = clause.verb[5].replace("_", " ")
        auxiliary = {"past": "did", "present": "does" if clause.subject.person == "he" else "do"}.get(clause.tense)
        if clause.tense == "modal":
            auxiliary = clause.modal[2]
            if auxiliary == "want_to":
                auxiliary, base = "does" if clause.subject.person == "he" else "do", f"want to {base}"
        return _join([auxiliary, clause.subject.en, base, *self.english_tail(clause)])


def _join(words):
    return " ".join(" ".join(words).split()).replace(",,", ",")


def generate(seed: int, sizes: dict[str, int]) -> dict[str, list[tuple[str, str]]]:
    """Return (German, English) pairs for each split of `sizes`: the same for the same arguments on every machine.

    Sentences of "train" have no held-out pair of words, those of other splits have at least one. No sentence occurs
    twice.
    """
    grammar = Grammar(seed)
    splits = {name: [] for name in sizes}
    seen = set()
    while any(len(splits[name]) < size for name, size in sizes.items()):
        de, en, held_out = grammar.draw()
        wanting = [n for n, size in sizes.items() if len(splits[n]) < size and (n != "train") == bool(held_out)]
        if wanting and de not in seen and en not in seen:
            seen.update((de, en))
            splits[wanting[0]].append((de, en))
    return splits


def main() -> None:
    """Write {train,valid,test}.tsv.gz, German and English, beside this file."""
    for split, pairs in generate(seed=1, sizes={"train": 8000, "valid": 200, "test": 500}).items():
        text = "".join(f"{german}\t{english}\n" for german, english in pairs)
        path = Path(__file__).with_name(f"{split}.tsv.gz")
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
        print(f"wrote {path}: {len(pairs):,} pairs")


if __name__ == "__main__":
    main()
