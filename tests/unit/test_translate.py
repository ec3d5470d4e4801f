"""Make a translation and its scores from hand-written lines of fairseq-generate."""

import io
import sys

import pytest
from samples import sample_data, sample_run

from encourage_mt.arguments import parse_arguments
from encourage_mt.data.subwords import join_pieces
from encourage_mt.environment import USER_DIR
from encourage_mt.errors import UserError
from encourage_mt.evaluation import engines, evaluate
from encourage_mt.recipe_parts import TOKENIZED_BLEU

# in the order in which fairseq finishes them, with lines of other kinds between
END = "Generate {} with beam=5: BLEU4 = 0"
GENERATED = ["S-1\tx", "D-1\t-0.5\tit &apos;s the cat .", "H-0\t-1\tno", "D-0\t-0.25\t10 <0xE2><0x82><0xAC> !"]
GENERATED.append(END.format("test"))
VALID = ["D-0\t0\tfirst", "D-1\t0\tsecond", END.format("valid")]


@pytest.fixture
def generate(monkeypatch):
    """generate(lines, code): what fairseq-generate prints and returns; generate.command is its command line."""

    def prepare(lines, code=0):
        def start(command, **options):
            prepare.command = command
            process = io.StringIO("\n".join(lines) + "\n")
            process.stdout, process.wait, process.returncode = process, lambda: code, code
            return process

        monkeypatch.setattr(engines, "start", start)

    return prepare


def translate(tmp_path, **fields):
    """Translate valid and test, of two sentences each, with fairseq; write and return test."""
    texts = {"de": ["a", "b"], "en": ["10 € !", "It's the cat."]}
    data = sample_data(tmp_path / "data", texts, **fields)
    run = sample_run(tmp_path / "ce.seed1", data.folder)
    lines = engines.translate_sets(run, data, tmp_path / "average.pt", "fairseq")
    assert list(lines) == ["valid", "test"] and lines["valid"] == ["first", "second"]
    return data, evaluate.write_translation(lines["test"], data, "test", run.folder), run.folder


def test_tokenized_text_is_kept_and_scored_beside_the_detokenized(generate, tmp_path):
    generate([*VALID, *GENERATED])
    data, lines, folder = translate(tmp_path, tokenizer="moses", remove_bpe="@@ ", byte_fallback=True)
    assert lines == ["10 € !", "it &apos;s the cat ."]
    assert (folder / "test.tok.en").read_text(encoding="utf-8") == "10 € !\nit &apos;s the cat .\n"
    assert (folder / "test.en").read_text(encoding="utf-8") == "10 €!\nit's the cat.\n"
    (data.folder / "tokenized").mkdir()
    (data.folder / "tokenized" / "test.en").write_text("10 € !\nit &apos;s the cat .\n", encoding="utf-8")
    scores = evaluate.score(lines, data, "test", folder, None)
    assert set(scores) == {"sacreBLEU", "chrF++", "TER", TOKENIZED_BLEU}
    assert scores[TOKENIZED_BLEU].score == pytest.approx(100) and scores["sacreBLEU"].score < 100


def test_raw_text_is_kept_as_it_was_generated(generate, tmp_path):
    generate([*VALID, *GENERATED])
    _, lines, folder = translate(tmp_path)
    assert lines == ["10 <0xE2><0x82><0xAC> !", "it &apos;s the cat ."], "without byte fallback"
    assert (folder / "test.en").read_text(encoding="utf-8").splitlines() == lines
    assert not (folder / "test.tok.en").exists()


def test_each_set_has_its_own_log(generate, tmp_path):
    generate([*VALID, *GENERATED])
    _, _, folder = translate(tmp_path)
    logs = [(folder / f"{split}.generate.log").read_text(encoding="utf-8") for split in ("valid", "test")]
    assert "first" in logs[0] and "cat" not in logs[0] and "first" not in logs[1] and "cat" in logs[1]


def test_each_value_is_one_word_with_its_option_and_our_plugin_comes_last(generate, tmp_path):
    generate([*VALID, *GENERATED])
    translate(tmp_path)
    program, data_bin, *words = generate.command
    assert (program, data_bin) == ("fairseq-generate", str(tmp_path / "data" / "data-bin"))
    assert all(word.startswith("--") for word in words) and words[-1] == f"--user-dir={USER_DIR}"
    assert {"--beam=5", "--lenpen=1.0", "--gen-subset=valid,test", "--source-lang=de", "--dataset-impl=mmap"} <= set(
        words
    )


@pytest.mark.parametrize(
    "lines, code, log",
    [
        (VALID[:1], 1, "valid"),
        ([VALID[0], VALID[2]], 0, "valid"),
        ([*VALID, *GENERATED[:2]], 0, "test"),
        ([*VALID, *GENERATED[:-1]], 1, "test"),
        ([*VALID, *GENERATED[:-1], "D-7\t0\tx", GENERATED[-1]], 0, "test"),
    ],
)
def test_a_failure_or_a_missing_sentence_is_one_line_with_the_log(lines, code, log, generate, tmp_path):
    generate(lines, code)
    with pytest.raises(UserError, match=f"{log}.generate.log"):
        translate(tmp_path)


@pytest.mark.parametrize(
    "pieces, remove_bpe",
    [(["▁10", "▁", "€", "▁cat", "s"], "sentencepiece"), ([], "sentencepiece"), (["ca@@", "ts", "run", "s@@"], "@@ ")],
)
def test_pieces_are_joined_as_fairseq_does(pieces, remove_bpe):
    data_utils = pytest.importorskip("fairseq.data.data_utils", reason="fairseq is not installed")
    assert join_pieces(pieces, remove_bpe) == data_utils.post_process(" ".join(pieces), remove_bpe)


def test_without_ctranslate2_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(UserError, match="serving.*pip install ctranslate2"):
        engines.load_model(tmp_path)


def test_on_several_gpus_each_run_is_scored_by_a_process_of_its_own(tmp_path, monkeypatch):
    data = sample_data(tmp_path / "data", {"de": ["a"], "en": ["b"]})
    runs = [sample_run(tmp_path / f"ce.seed{seed}", data.folder, seed=seed) for seed in (1, 2)]
    runs[1] = runs[1].model_copy(update={"temperature": 0.8})
    calls, codes = [], [0, 0]
    monkeypatch.setattr(evaluate, "visible_gpus", lambda: ["4", "7", "8"])
    monkeypatch.setattr(evaluate, "run_on_gpus", lambda commands, gpus: calls.append((commands, gpus)) or codes)
    monkeypatch.setattr(evaluate, "evaluate", lambda run, comet, engine: run.name)
    monkeypatch.setattr(evaluate.Result, "read", staticmethod(lambda folder: folder.name))
    assert evaluate.evaluate_all(runs, tmp_path / "comet", "ctranslate2") == ["ce.seed1", "ce.seed2"]
    ((commands, gpus),) = calls
    assert gpus == ["4", "7"]
    arguments = parse_arguments(commands[1][1:])
    assert arguments.runs == [runs[1].folder] and arguments.data == data.folder and arguments.comet.name == "comet"
    assert (arguments.average, arguments.beam, arguments.lenpen, arguments.engine) == (10, 5, 1.0, "ctranslate2")
    assert arguments.temperature == 0.8
    codes[1] = 2
    with pytest.raises(UserError, match="ce.seed2: "):
        evaluate.evaluate_all(runs)
    evaluate.evaluate_all(runs[:1])
    assert len(calls) == 2, "one run needs no other process"
