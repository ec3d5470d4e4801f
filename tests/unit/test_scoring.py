"""Compare scores with the sacrebleu command; test tokenizers by language, and COMET with a fake package."""

import json
import math
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from conftest import run
from sacrebleu.metrics import BLEU

from encourage_mt.errors import UserError
from encourage_mt.evaluation import evaluate, scoring

REFERENCES = [
    "The red house, near Berlin's old station, burned for 3,5 hours.",
    'He said: "That is NOT what I meant!" & left.',
    "Prices rose by 12.5% in May.",
    "A cat <sat> on the mat -- again.",
    "über alle Berge",
]
HYPOTHESES = [
    "The Red house near Berlin's old station burned 3.5 hours .",
    'he said: "That is not what I meant" & went away.',
    "prices rose 12.5 % in may.",
    "",
    "Über alle berge und Täler",
]
CHINESE = ["我喜欢看书。", "今天天气很好,我们去 Berlin 玩吧!"], ["我爱看书。", "今天天气好,我们去Berlin吧!"]


@pytest.fixture
def sacrebleu_command(tmp_path):
    """sacrebleu_command(hypotheses, references, *options): the values of the sacrebleu command, unrounded."""

    def ask(hypotheses, references, *options):
        for name, lines in (("hyp", hypotheses), ("ref", references)):
            (tmp_path / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return json.loads(run("sacrebleu", tmp_path / "ref", "-i", tmp_path / "hyp", *options, "-w", "14").stdout)

    return ask


def same(ours, theirs):
    assert ours.score == pytest.approx(theirs["score"], abs=1e-12)
    assert ours.signature == theirs["signature"]


COMMANDS = {"sacreBLEU": ("-m", "bleu"), "chrF++": ("-m", "chrf", "--chrf-word-order", "2"), "TER": ("-m", "ter")}
LOWER = {"sacreBLEU": ["-lc"], "chrF++": ["--chrf-lowercase"], "TER": []}  # the command's TER ignores case anyway


@pytest.mark.parametrize("lowercase", [False, True], ids=["cased", "lowercased"])
def test_scores_equal_those_of_the_sacrebleu_command(lowercase, sacrebleu_command):
    ours = scoring.score(HYPOTHESES, REFERENCES, "en", lowercase)
    assert set(ours) == set(COMMANDS)
    for name, options in COMMANDS.items():
        same(ours[name], sacrebleu_command(HYPOTHESES, REFERENCES, *options, *(LOWER[name] if lowercase else ())))
    assert ("case:lc" in ours["sacreBLEU"].signature) is lowercase
    assert ("case:lc" in ours["chrF++"].signature) is lowercase
    assert 0 < ours["sacreBLEU"].score < 100


def test_the_length_ratio_is_hypothesis_tokens_over_reference_tokens():
    references, hypotheses = ["one two three four five six seven eight"], ["one two three four five six"]
    assert scoring.score(hypotheses, references, "en")["sacreBLEU"].length_ratio == 6 / 8
    assert scoring.tokenized_bleu(hypotheses, references).length_ratio == 6 / 8


def test_chinese_scores_equal_those_of_the_command_with_its_options(sacrebleu_command):
    ours = scoring.score(*CHINESE, "zh_CN")
    assert ours["sacreBLEU"].score > 10
    same(ours["sacreBLEU"], sacrebleu_command(*CHINESE, "-m", "bleu", "-l", "en-zh"))
    same(ours["TER"], sacrebleu_command(*CHINESE, "-m", "ter", "--ter-asian-support", "--ter-normalized"))
    same(ours["chrF++"], sacrebleu_command(*CHINESE, *COMMANDS["chrF++"]))


def test_tokenized_bleu_is_that_of_the_command_without_tokenizer(sacrebleu_command):
    hypotheses = ["he said : &quot; no &quot; .", "it 's the U.S. one , is n't it ?"]
    references = ["he said : &quot; no ! &quot;", "it 's the U.K. one , is it not ?"]
    ours = scoring.tokenized_bleu(hypotheses, references)
    same(ours, sacrebleu_command(hypotheses, references, "-m", "bleu", "--tokenize", "none", "--force"))
    assert "tok:none" in ours.signature
    assert ours.score != pytest.approx(scoring.score(hypotheses, references, "en")["sacreBLEU"].score)


@pytest.mark.parametrize(
    "language, tokenizer",
    [("zh", "zh"), ("zh_CN", "zh"), ("zh-TW", "zh"), ("zho_Hans", "zh"), ("cmn", "zh"), ("de", "13a"), ("xx", "13a")],
)
def test_the_tokenizer_follows_the_target_language(language, tokenizer):
    entry = scoring.score(*CHINESE, language)
    assert f"tok:{tokenizer}|" in entry["sacreBLEU"].signature
    asian = "yes" if tokenizer == "zh" else "no"
    assert f"asian:{asian}" in entry["TER"].signature


@pytest.mark.parametrize("language, code", [("ja", "ja"), ("jpn_Jpan", "ja"), ("ko", "ko"), ("kor_Hang", "ko")])
def test_japanese_and_korean_are_scored_by_mecab_or_not_at_all(language, code):
    if find_spec({"ja": "MeCab", "ko": "mecab_ko"}[code]):
        signature = scoring.score(["猫 안녕"], ["犬 안녕"], language)["sacreBLEU"].signature
        assert f"tok:{code}-mecab" in signature
    else:
        with pytest.raises(UserError, match=rf"pip install 'sacrebleu\[{code}\]'") as error:
            scoring.metrics(language)
        assert "\n" not in str(error.value) and language in str(error.value)


@pytest.mark.parametrize(
    "hypotheses, references, expected",
    [
        (["a", "b"], ["a"], "2 hypotheses for 1 references"),
        (["a"], ["a", "b"], "1 hypotheses for 2 references"),
        (["", "  "], ["a", "b"], "the hypotheses are empty"),
        ([], [], "the hypotheses are empty"),
        (["a", "b"], ["a", "the <<unk>> b"], "reference line 2 contains <<unk>>"),
    ],
)
@pytest.mark.parametrize("function", [lambda h, r: scoring.score(h, r, "en"), scoring.tokenized_bleu])
def test_texts_that_cannot_be_scored_are_refused(function, hypotheses, references, expected):
    with pytest.raises(UserError, match=expected):
        function(hypotheses, references)


def test_an_unknown_word_of_the_model_or_some_empty_lines_are_scored():
    assert math.isfinite(scoring.score(["a <unk> b", ""], ["a b", "c"], "en")["sacreBLEU"].score)


def test_a_score_that_is_not_a_number_is_refused(monkeypatch):
    class Broken(BLEU):
        def corpus_score(self, hypotheses, references):
            result = super().corpus_score(hypotheses, references)
            result.score = math.nan
            return result

    monkeypatch.setattr(scoring, "BLEU", Broken)
    with pytest.raises(UserError, match="BLEU is not a number"):
        scoring.tokenized_bleu(["a b"], ["a b"])


def test_tokenized_translations_count_as_translations(tmp_path):
    data = SimpleNamespace(subsets={"test": "test"}, target="en")
    for name in ("test.en", "test.tok.en"):
        (tmp_path / name).write_text("a\n", encoding="utf-8")
    before = evaluate.hash_translations(tmp_path, data)
    (tmp_path / "test.tok.en").write_text("b\n", encoding="utf-8")
    after = evaluate.hash_translations(tmp_path, data)
    assert set(before) == {"test.en", "test.tok.en"} and before["test.en"] == after["test.en"] and before != after


# --- COMET


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A fake unbabel-comet 9.9: it returns the score in its model file and records its arguments."""
    packages = tmp_path / "packages"
    (packages / "unbabel_comet-9.9.dist-info").mkdir(parents=True)
    (packages / "unbabel_comet-9.9.dist-info" / "METADATA").write_text("Name: unbabel-comet\nVersion: 9.9\n")
    (packages / "comet.py").write_text(
        "from types import SimpleNamespace\n"
        "asked = []\n"
        "def load_from_checkpoint(path):\n"
        "    def predict(rows, batch_size, gpus):\n"
        "        asked.append((rows, gpus))\n"
        "        return SimpleNamespace(system_score=float(open(path).read()))\n"
        "    return SimpleNamespace(predict=predict)\n"
    )
    monkeypatch.syspath_prepend(packages)
    yield packages
    sys.modules.pop("comet", None)


def test_comet_scores_with_the_model_on_disk_and_signs_with_its_digest(stub, tmp_path):
    signatures = []
    for number, value in enumerate((0.8125, 0.5)):
        model = tmp_path / str(number) / "model.ckpt"
        model.parent.mkdir()
        model.write_text(str(value))
        entry = scoring.comet(model, ["s1", "s2"], ["h1", "h2"], ["r1", "r2"], gpus=0)
        assert entry.score == 100 * value
        assert entry.signature.startswith("unbabel-comet:9.9|model:model.ckpt|sha256:")
        assert entry.signature == scoring.comet_signature(model)
        signatures.append(entry.signature)
    assert signatures[0] != signatures[1], "another model of the same file name"
    import comet

    assert comet.asked[0] == ([{"src": "s1", "mt": "h1", "ref": "r1"}, {"src": "s2", "mt": "h2", "ref": "r2"}], 0)


def test_comet_is_refused_without_its_package_its_model_or_a_finite_score(stub, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="none.ckpt: no such COMET model"):
        scoring.comet(tmp_path / "none.ckpt", ["s"], ["h"], ["r"], gpus=0)
    model = tmp_path / "model.ckpt"
    model.write_text("nan")
    with pytest.raises(UserError, match="COMET is not a number"):
        scoring.comet(model, ["s"], ["h"], ["r"], gpus=0)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(stub)])
    with pytest.raises(UserError, match="needs the package unbabel-comet: pip install"):
        scoring.comet(model, ["s"], ["h"], ["r"], gpus=0)
