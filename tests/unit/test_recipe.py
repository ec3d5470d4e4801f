"""Test recipes: mistakes are refused in one line that names file and key; reversed and modern forms."""

import copy
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY, refused, write_recipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from encourage_mt.data.sizing import choose
from encourage_mt.errors import UserError
from encourage_mt.recipe import check_train_options, load_recipe
from encourage_mt.training.train import make_run

FILES = {"train": ["a", "b"], "valid": ["c", "d"], "test": ["e", "f"]}
TRAIN, EL, CE = TINY["train"], TINY["arms"]["el"], TINY["arms"]["ce"]
SCORES = {"ce": [1, 0.1], "el": [2, 0.1]}


def refusal(path, **options):
    """The problem with a recipe: the one line of its UserError, without the name of the file."""
    with pytest.raises(UserError) as error:
        load_recipe(path, **options)
    line = str(error.value)
    assert "\n" not in line and line.startswith(f"{path}: ") and len(line) < 1000
    return line.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    "key, changes",
    [
        ("colour: ", {"colour": "red"}),
        ("arms.el.train.bonus", {"arms": {"ce": CE, "el": {**EL, "train": {"bonus": "my_bonus:square"}}}}),
        ("arms.el: ", {"arms": {"ce": CE, "el": {**EL, "bonus-schedule": "linear"}}}),  # without its updates
        ("arms.el: ", {"arms": {"ce": CE, "el": {**EL, "rdrop-alpha": 5, "fuse-projection": True}}}),
        ("name: ", {"name": "../x"}),
        ("name: ", {"name": 7}),
        ("source: ", {"source": False}),
        ("source: ", {"source": "pt-br"}),
        ("target: ", {"target": "de"}),
        ("average: ", {"average": 3}),  # of 2 epochs
        ("average: ", {"average": True}),
        ("beam: ", {"beam": 0}),
        ("beam: ", {"beam": "--user-dir=evil"}),
        ("lenpen: ", {"lenpen": float("nan")}),
        ("lenpen: ", {"lenpen": 10**400}),
        ("tokenizer: ", {"tokenizer": "spacy"}),
        ("lowercase: ", {"lowercase": "yes"}),
        ("aggressive_hyphens: ", {"aggressive_hyphens": True}),  # without Moses
        ("clean.max_len: ", {"clean": {"max_len": 3}}),
        ("clean.max_length: ", {"clean": {"max_length": 0}}),
        ("clean.max_ratio: ", {"clean": {"max_ratio": float("inf")}}),
        ("clean.unit: ", {"clean": {"unit": "words"}}),
        ("subword: ", {"subword": {}}),
        ("subword: ", {"subword": {"merges": 9, "vocab_size": 9}}),
        ("subword.merges: ", {"subword": {"merges": 0}}),
        ("subword.merges: ", {"subword": {"merges": None}}),
        ("subword.vocab_size: ", {"subword": {"vocab_size": 1e30}}),
        ("subword.model_type: ", {"subword": {"model_type": "zzz", "vocab_size": 9}}),
        ("subword.model_prefix: ", {"subword": {"model_prefix": "/tmp/x", "vocab_size": 9}}),
        ("data: ", {"data": {**FILES, "valid_every": 2}}),  # valid twice
        ("data: ", {"data": {"train": ["a"], "valid": ["b"]}}),
        ("data: ", {"data": {"train": ["a"], "test": ["b"]}}),
        ("data: ", {"data": [FILES, {"train": ["a"], "held_out": {"valid": 1, "tst": 1}}]}),
        ("data: ", {"data": {**FILES, "/home/u/": ["g", "h"]}}),
        ("data: ", {"data": {**FILES, "average": ["g", "h"]}}),  # a translation would be average.pt
        ("data.test: ", {"data": {**FILES, "test": []}}),
        ("data.train: ", {"data": {**FILES, "train": "a"}}),
        ("data.train: ", {"data": {**FILES, "train": ["/etc/passwd", "b"]}}),
        ("data.train: ", {"data": {**FILES, "train": ["a.tgz:../b", "b"]}}),
        ("data.train: ", {"data": {**FILES, "train": ["a\0b", "b"]}}),
        ("data.train: ", {"data": {**FILES, "train": ["a", "a"]}}),  # the same text on both sides
        ("data: columns: ", {"data": {**FILES, "columns": [2, 2]}}),
        ("data.valid_every: ", {"data": {"train": ["a", "b"], "test": ["e", "f"], "valid_every": 1}}),
        ("data.held_out.valid: ", {"data": {"train": ["a"], "valid": ["b"], "held_out": {"valid": 0, "test": 5}}}),
        ("data.columns.0: ", {"data": {**FILES, "columns": [0, 1]}}),
        ("data.urls: ", {"data": {**FILES, "urls": "https://x"}}),
        ("data.urls.0: ", {"data": {**FILES, "urls": ["file:///etc"]}}),
        ("data.checksums.a.0: ", {"data": {**FILES, "checksums": {"a": "sha1:12"}}}),
        ("expected.zzz: ", {"expected": {"zzz": {"kept": 1}}}),
        ("expected.train.zzz: ", {"expected": {"train": {"zzz": 1}}}),
        ("train: ", {"train": {**TRAIN, "max-update": 9}}),  # and max-epoch
        ("train.max-tokens: ", {"train": {"max-epoch": 2}}),
        ("train.batch-size: ", {"train": {**TRAIN, "batch-size": "abc"}}),
        ("train.max-sentences: ", {"train": {**TRAIN, "max-sentences": 64}}),
        ("train.update-freq: ", {"train": {**TRAIN, "update-freq": "2"}}),
        ("train.update-freq: ", {"train": {**TRAIN, "update-freq": [1, 2]}}),
        ("train.max-epoch: ", {"train": {**TRAIN, "max-epoch": None}}),
        ("train.seed: ", {"train": {**TRAIN, "seed": 7}}),
        ("train.user-dir: ", {"train": {**TRAIN, "user-dir": "evil"}}),
        ("train.user-dir=evil: ", {"train": {**TRAIN, "user-dir=evil": 1}}),
        ("train.dropout: ", {"train": {**TRAIN, "dropout": "--user-dir=evil"}}),
        ("train.adam-betas: ", {"train": {**TRAIN, "adam-betas": "__import__('os').system('x')"}}),
        ("train.adam-betas: ", {"train": {**TRAIN, "adam-betas": "(0.9, 0.98"}}),
        ("train.tensorboard-logdir: ", {"train": {**TRAIN, "tensorboard-logdir": "/home/u"}}),
        ("arms: ", {"arms": {}}),
        ("arms.a|b: ", {"arms": {"a|b": CE}}),
        ("arms.el: ", {"arms": {"el": {**EL, "lr": 1}}}),
        ("arms.el: ", {"arms": {"el": {**EL, "log-end": 2}}}),
        ("arms.el: ", {"arms": {"el": {**EL, "bonus": "tanh"}}}),
        ("arms.el: ", {"arms": {"el": {**EL, "bonus": "evil:bonus"}}}),
        ("arms.el.criterion: ", {"arms": {"el": {"log-end": 1}}}),
        ("arms.el.criterion: ", {"arms": {"el": {"criterion": "--user-dir=evil"}}}),
        ("arms.el.train.seed: ", {"arms": {"el": {**EL, "train": {"seed": 1}}}}),
        ("arms.el.train.max-epoch: ", {"arms": {"el": {**EL, "train": {"max-epoch": 0}}}}),
        ("published.metric: ", {"published": {"source": "x", "metric": "BLUE", "scores": SCORES}}),
        ("published.scores: ", {"published": {"source": "x", "metric": "TER", "scores": {"ce": [1, 1]}}}),
        ("published.scores.fl: ", {"published": {"source": "x", "metric": "TER", "scores": {**SCORES, "fl": [1, 1]}}}),
        ("published.scores.el: ", {"published": {"source": "x", "metric": "TER", "scores": {**SCORES, "el": [1]}}}),
    ],
)
def test_a_mistake_is_refused_by_its_key(key, changes, tmp_path):
    assert refusal(write_recipe(tmp_path, **changes)).startswith(key)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("name: a\nname: b\n", "name"),
        ("train: {max-epoch: 1, max-epoch: 2}\n", "max-epoch"),
        ("[" * 1000, "not YAML"),
        (b"name: \xff\n", "not YAML"),
        ("name: a\0b\n", "not YAML"),
        ("x: !!python/object/apply:os.system [true]\n", "not YAML"),
        ("name: 0x" + "f" * 9999, "name: "),
        ("beam: " + "9" * 9999, "not YAML"),
        ("- a\n", "not a recipe"),
        ("# " + "x" * 10**6, "not a recipe"),
        ("", "not a recipe"),
    ],
    ids=range(11),
)
def test_a_file_that_is_not_a_recipe_is_refused(text, expected, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert expected in refusal(path)


def test_the_command_line_prints_one_line_and_makes_nothing(tmp_path, capsys):
    recipe = write_recipe(tmp_path, beam=0)
    for command in ("prepare", "run"):
        assert f"{recipe}: beam: " in refused(capsys, command, recipe, "--work-dir", tmp_path / "work")
    assert "No such file" in refused(capsys, "prepare", tmp_path / "none.yaml")
    assert not (tmp_path / "work").exists()


def test_a_recipe_names_a_module_only_with_the_users_consent(tmp_path, monkeypatch):
    monkeypatch.setenv("ENCOURAGE_MT_BONUSES", "other:one my_bonus:square")
    recipe = load_recipe(write_recipe(tmp_path, arms={"el": {**EL, "bonus": "my_bonus:square"}}))
    assert recipe.arms["el"].options["bonus"] == "my_bonus:square"


def test_options_fairseq_does_not_know_are_refused(tmp_path):
    check_train_options(load_recipe(write_recipe(tmp_path)))
    for changes, key in (
        ({"train": {**TRAIN, "warmup": 3}}, "--warmup"),
        ({"train": {**TRAIN, "arch": "zzz"}}, "--arch"),
        ({"train": {**TRAIN, "lr": "many"}}, "--lr"),
        ({"arms": {"el": {"criterion": "zzz"}}}, "--criterion"),
    ):
        path = write_recipe(tmp_path, **changes)
        with pytest.raises(UserError) as error:
            check_train_options(load_recipe(path))
        line = str(error.value)
        assert line.startswith(f"{path}: arms.") and key in line and "\n" not in line and len(line) < 1000


def test_an_arm_may_train_with_options_of_its_own(tmp_path):
    arms = {"ce": {**CE, "train": {"max-epoch": 4, "lr": 0.003}}, "el": EL, "long": {**EL, "train": {"max-update": 50}}}
    recipe = load_recipe(write_recipe(tmp_path, arms=arms))
    assert recipe.arm_train("ce") == {**TRAIN, "max-epoch": 4} and recipe.arm_train("el") == TRAIN
    assert recipe.arm_train("long") == {key: v for key, v in TRAIN.items() if key != "max-epoch"} | {"max-update": 50}
    assert [recipe.arm_differences(arm) for arm in arms] == [["max-epoch"], [], ["max-update"]]
    assert recipe.arms["ce"].options == CE


def test_an_arm_may_average_another_number_of_checkpoints(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, arms={"ce": CE, "el": {**EL, "average": 2}}, average=1))
    assert [recipe.arm_average(arm) for arm in ("ce", "el")] == [1, 2]
    assert [recipe.arm_differences(arm) for arm in ("ce", "el")] == [[], ["average"]]
    assert [make_run(recipe, arm, 1, tmp_path, tmp_path, "fp32").average for arm in ("ce", "el")] == [1, 2]
    assert recipe.arms["el"].options == EL
    with pytest.raises(UserError, match="arms.el.average: must be between 1 and max-epoch"):
        load_recipe(write_recipe(tmp_path, arms={"el": {**EL, "average": 99}}))


def test_the_other_direction_and_the_modern_pipeline(tmp_path):
    data = {**FILES, "columns": [2, 1], "drop_tags": ["url"]}
    changes = {"data": data, "tokenizer": "moses", "lowercase": True, "subword": {"merges": 300}, "name": "tiny_de_en"}
    recipe = load_recipe(write_recipe(tmp_path, **changes, joined_dictionary=False))
    turned = recipe.reversed()
    assert (turned.name, turned.source, turned.target) == ("tiny_en_de", "en", "de")
    assert turned.data[0].splits["train"] == [["b", "a"]] and turned.data[0].columns == [1, 2]
    assert turned.reversed().preparation == {**recipe.preparation, "data": turned.reversed().preparation["data"]}
    modern = turned.modern()
    assert (modern.name, modern.corpus, modern.remove_bpe) == ("tiny_en_de.modern", "tiny", "sentencepiece")
    assert modern.preparation["subword"]["vocab_size"] == 300 and modern.preparation["clean"]["max_length"] == 250
    assert modern.tokenizer == "none" and not modern.lowercase and modern.joined_dictionary


def test_arms_of_the_bundled_recipes_differ_in_one_training_option_or_in_length_with_warmup():
    for path in sorted((ROOT / "examples").glob("*/recipe.yaml")):
        own = {"bitext": ["/any/a.de", "a.en"], "chosen": choose(8000, 0)} if path.parent.name == "own" else {}
        recipe = load_recipe(path, **own)
        assert set(recipe.arms) >= {"ce", "el"}
        for name, arm in recipe.arms.items():
            lengths = [options.get("max-epoch") or options.get("max-update") for options in (recipe.train, arm.train)]
            if "rdrop-alpha" in arm.options:
                assert lengths[1] == lengths[0] / 2 and recipe.arm_average(name) == recipe.average // 2, name
            assert len(set(arm.train) - {"warmup-updates"}) <= 1
            warmups = [options.get("warmup-updates") for options in (recipe.train, arm.train)]
            assert warmups[1] is None or ("rdrop-alpha" in arm.options and warmups[1] == warmups[0] / 2), name
    check_train_options(load_recipe(ROOT / "examples/multi30k_de_en/recipe.yaml"))


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, "--bitext"),
        ({"source": "de"}, "--bitext"),
        ({"bitext": ["corpus.tsv"]}, "--source"),
        ({"bitext": ["corpus.tsv"], "source": "de"}, "--target"),
        ({"bitext": ["a.de", "b.de"]}, "both languages are de; name two with --source and --target"),
        ({"bitext": ["a.de", "b.en", "c.en"]}, "--bitext"),
        ({"bitext": ["a.pt-br", "b.en"]}, "source: "),
    ],
)
def test_wrong_options_for_own_text_are_refused(options, expected):
    with pytest.raises(UserError, match=expected):
        load_recipe(ROOT / "examples/own/recipe.yaml", **options, chosen=choose(8000, 0))
    with pytest.raises(UserError, match="--bitext"):
        load_recipe(ROOT / "examples/bundled_de_en/recipe.yaml", bitext=["a.de", "a.en"])


# --- changes on the command line


def changed(tmp_path, settings=(), new_arms=(), **changes):
    return load_recipe(write_recipe(tmp_path, **changes), settings=settings, new_arms=new_arms)


def test_what_an_arm_sets_itself_takes_precedence(tmp_path):
    arms = {"ce": {**CE, "train": {"max-epoch": 4, "lr": 0.1}, "average": 1}, "el": EL}
    recipe = changed(tmp_path, ["max-epoch=9", "lr=0.2", "average=3"], arms=arms)
    found = [(recipe.arm_train(arm)["max-epoch"], recipe.arm_train(arm)["lr"], recipe.arm_average(arm)) for arm in arms]
    assert found == [(4, 0.1, 1), (9, 0.2, 3)]


def test_settings_change_training_criterion_and_translation(tmp_path):
    published = {"source": "x", "metric": "TER", "scores": SCORES}
    settings = ["lr=0.005", "max-update=7", "adam-betas=(0.9, 0.98)", "share-all-embeddings=false", "beam=3"]
    settings += ["log-end=0.25", "label-smoothing=0.2"]
    recipe = changed(tmp_path, settings, published=published)
    expected = {**TRAIN, "lr": 0.005, "max-update": 7, "adam-betas": "(0.9, 0.98)", "share-all-embeddings": False}
    assert recipe.train == {name: value for name, value in expected.items() if name != "max-epoch"}
    assert recipe.beam == 3 and recipe.published is None
    assert recipe.arms["ce"].options == {**CE, "label-smoothing": 0.2}
    assert recipe.arms["el"].options == {**EL, "label-smoothing": 0.2, "log-end": 0.25}


def test_label_smoothing_is_set_where_the_criterion_has_it(tmp_path):
    recipe = changed(tmp_path, ["label-smoothing=0.2"], arms={"ce": CE, "plain": {"criterion": "cross_entropy"}})
    assert recipe.arms["ce"].options["label-smoothing"] == 0.2
    assert recipe.arms["plain"].options == {"criterion": "cross_entropy"}


def test_numbers_with_an_exponent_are_numbers(tmp_path):
    recipe = changed(tmp_path, ["lr=1e-3", "label-smoothing=2e-1"], ["soft=el,log-end=5e-1"])
    assert recipe.train["lr"] == 0.001 and recipe.arms["ce"].options["label-smoothing"] == 0.2
    assert recipe.arms["soft"].options["log-end"] == 0.5


def test_an_arm_is_made_from_another_one(tmp_path):
    recipe = changed(tmp_path, ["label-smoothing=0.2"], ["soft=el,log-end=0.25,max-update=7,adam-betas=(0.9, 0.98)"])
    assert recipe.arms["soft"].options == {**EL, "label-smoothing": 0.2, "log-end": 0.25}
    assert recipe.arms["soft"].train == {"max-update": 7, "adam-betas": "(0.9, 0.98)"}
    assert recipe.arms["el"].train == {} and list(recipe.arms) == ["ce", "el", "soft"]


@pytest.mark.parametrize(
    "settings, new_arms, expected",
    [
        (["seed=3"], [], "train.seed: "),
        (["user-dir=x"], [], "train.user-dir: "),
        (["lr=$(rm)"], [], "train.lr: "),
        (["lr"], [], "train.lr: "),
        (["lr=nan"], [], "train.lr: "),
        (["lr=["], [], "--set"),
        (["max-epoch=1"], [], "average: "),
        (["max-epoch=5", "max-update=9"], [], "replace each other"),
        (["beam=0"], [], "beam: "),
        (["log-end=7"], [], "log_end"),
        ([], ["x"], "--add-arm"),
        ([], ["x=el"], "--add-arm"),
        ([], ["x=fl,log-end=1"], "ce, el"),
        ([], ["ce=el,log-end=1"], "ce already"),
        ([], ["a/b=el,log-end=1"], "arms.a/b: "),
        ([], ["x=el,log-end=7"], "log_end"),
        ([], ["x=el,seed=7"], "arms.x.train.seed: "),
    ],
)
def test_a_wrong_change_is_refused_in_one_line(settings, new_arms, expected, tmp_path):
    with pytest.raises(UserError) as error:
        changed(tmp_path, settings, new_arms)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_setting_that_no_arm_has_is_refused(tmp_path):
    with pytest.raises(UserError, match="log-end"):
        changed(tmp_path, ["log-end=0.25"], arms={"ce": CE})


# --- any content is accepted or refused in one line

LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary(max_size=3)
)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LEAVES, inner, max_size=3))
WHOLE = {
    **{**TINY, "data": [{**FILES, "urls": ["https://x"], "checksums": {"a": "md5:" + "0" * 32}, "columns": [1, 2]}]},
    **{"clean": {"max_length": 9, "max_ratio": 2.5}, "expected": {"train": {"kept": [1, 2]}}, "lenpen": 1.0},
    "published": {"source": "x", "metric": "TER", "scores": SCORES},
}


def places(content, prefix=()):
    """All key paths of nested mappings and lists."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*prefix, key)
        yield from places(value, (*prefix, key))


@settings(max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(list(places(WHOLE))), VALUES, st.sampled_from(["replace", "add", "rename"]))
def test_any_change_of_a_recipe_is_accepted_or_refused_in_one_line(tmp_path_factory, place, value, change):
    content = copy.deepcopy(WHOLE)
    parent = content
    for key in place[:-1]:
        parent = parent[key]
    if change == "replace" or isinstance(parent, list):
        parent[place[-1]] = value
    else:
        try:
            parent[value] = parent.pop(place[-1]) if change == "rename" else 1
        except TypeError:  # a list is not a key
            return
    path = Path(tmp_path_factory.getbasetemp()) / "fuzzed.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    try:
        load_recipe(path)
    except UserError as error:
        line = str(error)
        assert line.startswith(f"{path}: ") and line.isprintable() and len(line) < 1000
