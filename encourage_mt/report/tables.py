"""Write tables in Markdown: runs, arms over their seeds, diagnostics, learning curves, published figures."""

import statistics
from itertools import dropwhile, takewhile
from operator import attrgetter

from ..evaluation.comparison import Comparison
from ..evaluation.diagnostics import Analysis
from ..evaluation.formatting import escape, format_mean, format_p, markdown_table, signature_lines
from ..evaluation.results import HEADLINE, CurvePoint, Result, by_arm, searches
from ..evaluation.significance import SOUGHT, MetricComparison, compared_seeds, format_seeds
from ..files import Scalar
from ..recipe import Recipe
from ..training.run_folder import rows_by_epoch

DIAGNOSTICS = {
    "valid nll (nats)": "nll",
    "calibration error": "calibration.error",
    "mean margin (nats)": "margin.mean",
    "energy gap (nats)": "energy.gap",
    "token accuracy": "accuracy",
    "gradient share of p > 0.5": "gradient.well_classified",
}
PACKAGES = ("python", "torch", "fairseq-fixed", "fairseq", "sentencepiece", "subword-nmt", "sacrebleu")


def runs_table(results: list[Result]) -> str:
    """Return a row for each run and set, followed by alarms and signatures."""
    metrics = list(all_signatures(results))
    rows = []
    for result in results:
        speed = [format_number(result.target_tokens_per_second, ",.0f"), format_time(result.train_seconds)]
        for split, scores in result.scores.items():
            values = [f"{scores[metric].score:.2f}" if metric in scores else "" for metric in metrics]
            rows.append([result.name, split, *values, format_number(scores[HEADLINE].length_ratio, ".3f"), *speed])
    header = ["run", "set", *metrics, "length ratio", "target tokens/s", "training time"]
    return "\n".join(
        [markdown_table(header, rows), "", *alarm_lines(results), *signature_lines(all_signatures(results))]
    )


def alarm_lines(results: list[Result]) -> list[str]:
    """Return the alarms of each run as lines of Markdown."""
    return [f"**{escape(f'{result.name}: {alarm}')}**  " for result in results for alarm in result.alarms]


def format_number(value: float | None, digits: str) -> str:
    return "" if value is None else f"{value:{digits}}"


def format_time(seconds: float | None) -> str:
    return "" if seconds is None else f"{round(seconds) // 60}:{round(seconds) % 60:02d}"


def arms_table(results: list[Result], comparisons: list[Comparison]) -> str:
    """Return a row for each arm and test set: mean ± standard deviation over seeds, gains and their p-values.

    The length ratio is a mean over seeds, of tokens of the translation / tokens of the reference as BLEU counts them.
    Gains are relative to the first arm and to every baseline of `comparisons` the arm was compared with. They use the
    seeds of `paired_seeds` (listed if not all), or all seeds if it has none. p over sentences comes from approximate
    randomization in the comparisons. The sets are those of the comparisons or, without comparisons, valid and all
    test sets. Lines below the table give each arm's criterion options and other differences, the signatures and the
    setting. `results` must be of runs of `encourage-mt run`.
    """
    arms = by_arm(results)
    splits = list(comparisons[0].tests) if comparisons else list(results[0].scores)
    metrics = list(all_signatures(results))
    first = next(iter(arms))
    rows = []
    for arm, group in arms.items():
        compared = {c.baseline: c for c in comparisons if c.candidate == arm and c.baseline in arms}
        baselines = list(dict.fromkeys([*([first] if arm != first else []), *compared]))
        for split in splits:
            scores = [[r.scores[split][metric].score for r in group if metric in r.scores[split]] for metric in metrics]
            gains, over_seeds, over_sentences = [], [], []
            for baseline in baselines:
                tests = compared[baseline].tests.get(split, {}) if baseline in compared else {}
                gain, seeds = gain_over(arms[baseline], group, split)
                gains.append(f"{baseline}{seeds}: {gain.format_gain()}")
                over_seeds.append(format_p(gain.p) or "-")
                over_sentences.append(sentence_tests(tests[HEADLINE].sentence_p if tests else {}, gain) or "-")
            cells = [arm, split, str(len(group)), *(format_mean(values) if values else "" for values in scores)]
            lengths = [ratio for r in group if (ratio := r.scores[split][HEADLINE].length_ratio) is not None]
            cells.append(format_number(statistics.mean(lengths) if lengths else None, ".3f"))
            rows.append([*cells, *map("; ".join, (gains, over_seeds, over_sentences))])
    header = ["arm", "set", "seeds", *metrics, "length ratio"]
    header += [f"gain in {HEADLINE} over", "p over seeds", "p over sentences, by seed"]
    options = []
    for arm, group in arms.items():
        others = training_differences(group[0], arms[first][0])
        search = f"; {' or '.join(searches(group))}" if len(searches(results)) > 1 else ""
        options.append(f"{arm}: `{criterion_line(group[0])}`{f'; differs in: {others}' if others else ''}{search}  ")
    *setting, machines = describe_setting(results).values()
    lines = [*options, *alarm_lines(results), *signature_lines(all_signatures(results))]
    lines += [f"Setting: {'; '.join(setting)}.  ", f"Trained on: {machines}.  "]
    return "\n".join([markdown_table(header, rows), "", *lines])


def gains_table(pairs: list[tuple[str, list[Result], list[Result]]]) -> str:
    """Return a row for each test set of each (name, results of one arm, those of another).

    If the pairs have different arms, a column names them.

    Scores are of the seeds that the gain compares; the last columns are its p-value over seeds, the number of these
    seeds, and how many would detect SOUGHT BLEU with 80% power.
    """
    arms = [(first[0].arm, second[0].arm) for _, first, second in pairs]
    is_mixed = len(set(arms)) > 1
    rows = []
    for (name, first, second), names in zip(pairs, arms, strict=True):
        both = [*first, *second]
        averages = dict.fromkeys(result.evaluation.average for result in both)
        used = " or ".join("last checkpoint" if number == 1 else f"{number} averaged" for number in averages)
        labels = [name, ", ".join(names)] if is_mixed else [name]
        for split in first[0].scores:
            if split == "valid":
                continue
            gain, paired = gain_over(first, second, split)
            means = [format_mean(side.values()) for side in (gain.baseline, gain.candidate)]
            seeds = format_seeds(gain.seeds_for_sought).removesuffix(" seeds") if gain.has_spread else "-"
            cells = [f"{gain.format_gain()}{paired}", format_p(gain.p) or "-", str(len(gain.candidate)), seeds]
            rows.append([*labels, f"{used}; {' or '.join(searches(both))}", split, *means, *cells])
    names = ("the first arm", "the second") if is_mixed else arms[0]
    header = ["runs", *(["arms"] if is_mixed else []), "checkpoints and search", "test set"]
    header += [*(f"{HEADLINE} of {name}" for name in names), "gain", "p over seeds", "seeds"]
    header += [f"seeds for a gain of {SOUGHT}"]
    signatures = all_signatures([result for _, first, second in pairs for result in (*first, *second)])
    return "\n".join([markdown_table(header, rows), "", *signature_lines({HEADLINE: signatures[HEADLINE]})])


def gain_over(baseline: list[Result], candidate: list[Result], split: str) -> tuple[MetricComparison, str]:
    """Return the gain over the seeds of `paired_seeds`, or all if it has none, and ", seed ..." if not all are used."""
    sides = [{r.seed: r.scores[split][HEADLINE].score for r in group} for group in (baseline, candidate)]
    first, second = compared_seeds(*sides)
    seeds = "" if [len(first), len(second)] == list(map(len, sides)) else f", seed {', '.join(map(str, first))}"
    return MetricComparison(HEADLINE, first, second), seeds


def sentence_tests(p: dict[int, dict[str, float]], gain: MetricComparison) -> str:
    """Return p by seed; the seeds are listed if not all seeds of the gain were tested."""
    tested = sorted(set(p) & set(gain.baseline) & set(gain.candidate))
    is_complete = set(tested) == {*gain.baseline, *gain.candidate}
    seeds = "" if is_complete or not tested else f"seed {', '.join(map(str, tested))}: "
    return seeds + ", ".join(format_p(p[seed]["ar"]) for seed in tested)


def describe_setting(results: list[Result]) -> dict[str, str]:
    """Return data, model, training, search and hardware of the runs, {name: text}; if they differ, each value."""

    def each(settings, name):
        values = [getattr(result, settings).get(name, "?") for result in results]
        return " or ".join(dict.fromkeys(f"{v:,}" if isinstance(v, int) else str(v) for v in values))

    def search(name):
        return " or ".join(dict.fromkeys(str(getattr(result.evaluation, name)) for result in results))

    starts = [start for result in results for start in result.provenance.get("starts", [])]
    machines = {
        f"{s['machine']}; " + ", ".join(f"{name} {s['versions'][name]}" for name in PACKAGES if name in s["versions"])
        for s in starts
    }
    hours = [result.train_seconds / 3600 for result in results if result.train_seconds is not None]
    each_run = sum(hours) / max(1, len(hours))
    spent = f"{each_run:.2f} hours of training per run, {sum(hours):.1f} if one after another" if hours else ""
    counts = [result.parameters for result in results if result.parameters]
    sizes = " or ".join(dict.fromkeys(f"{count:,}" for count in counts))
    unit = "sentences" if each("training", "tokens per update") == "0" else "tokens"
    engine = "" if search("engine") == "fairseq" else f", engine {search('engine')}"
    temperature = "" if search("temperature") == "1.0" else f", temperature {search('temperature')}"
    layers = f"{each('training', 'encoder_layers')}+{each('training', 'decoder_layers')} layers"
    return {
        "data": f"{results[0].recipe}, {each('options', 'source-lang')} to {each('options', 'target-lang')}",
        "model": f"{each('training', 'arch')}, {layers}, {each('training', 'encoder_embed_dim')} wide"
        f"{f', {sizes} parameters' if sizes else ''}",
        "training": f"{each('training', f'{unit} per update')} {unit} per update, "
        f"{each('training', 'updates')} updates",
        "search": f"last epoch checkpoints averaged: {search('average')}, beam {search('beam')}, length penalty "
        f"{search('lenpen')}{temperature}{engine}",
        "hardware": "; ".join(filter(None, [" or ".join(sorted(machines)), spent])),
    }


def diagnostics_table(results: list[Result]) -> str:
    """Return a row for each arm: mean ± standard deviation of each of DIAGNOSTICS over the results that have them."""
    rows = []
    for arm, group in by_arm([result for result in results if result.diagnostics]).items():
        analyses = [result.diagnostics or {} for result in group]
        values = [[of_run[name] for of_run in analyses if name in of_run] for name in DIAGNOSTICS]
        rows.append([arm, str(len(group)), *(format_mean(side, 3) if side else "" for side in values)])
    return markdown_table(["arm", "seeds", *DIAGNOSTICS], rows)


def diagnostic_values(analysis: Analysis) -> dict[str, float]:
    """Return the values of DIAGNOSTICS that the analysis has."""
    known = {name: field for name, field in DIAGNOSTICS.items() if getattr(analysis, field.split(".")[0]) is not None}
    return {name: attrgetter(field)(analysis) for name, field in known.items()}


def learning_curve(records: list[dict]) -> list[CurvePoint]:
    """Return greedy BLEU and nll on valid after each epoch, from the records of a log."""
    ends = rows_by_epoch(records, "valid_num_updates", "valid_bleu", "valid_nll_loss")
    return [CurvePoint(epoch=epoch, updates=row[0], bleu=row[1], nll=row[2]) for epoch, row in ends.items()]


def curve_table(results: list[Result]) -> str:
    """Return a row for each epoch all results have: mean ± deviation of each arm, gap of BLEU to the first arm.

    The gap is over the seeds of `paired_seeds`, or all if it has none; so are the means of two arms. Results without a
    curve are left out.
    """
    arms = by_arm([result for result in results if result.curve])
    by_epoch = [{r.seed: {point.epoch: point for point in r.curve or ()} for r in group} for group in arms.values()]
    by_epoch = compared_seeds(*by_epoch)
    epochs = [set(points) for side in by_epoch for points in side.values()]
    rows = []
    for epoch in sorted(set.intersection(*epochs) if epochs else ()):
        sides = [{seed: points[epoch] for seed, points in side.items()} for side in by_epoch]
        bleu = [{seed: point.bleu for seed, point in side.items()} for side in sides]
        nll = [[point.nll for point in side.values()] for side in sides]
        gaps = [f"{MetricComparison('greedy BLEU', bleu[0], other).gain:+.2f}" for other in bleu[1:]]
        updates = next(iter(sides[0].values())).updates
        means = [format_mean(side.values()) for side in bleu], [format_mean(side) for side in nll]
        rows.append([f"{epoch:.0f}", f"{updates:,.0f}", *means[0], *gaps, *means[1]])
    names = list(arms)
    header = [f"greedy BLEU {arm}" for arm in names] + [f"gap {arm}" for arm in names[1:]]
    return markdown_table(["epoch", "updates", *header, *(f"nll {arm} (bits)" for arm in names)], rows)


def published_table(recipe: Recipe, results: list[Result]) -> str:
    """Return the figures in the recipe's `published` and, below them, ours, or "not yet run"."""
    published = recipe.published
    if published is None:
        raise ValueError(f"{recipe.name} has no published figures")
    metric, theirs = published.metric, list(published.scores.values())
    arms = list(published.scores)
    rows = [[published.source, *(f"{m:.2f} ± {sd:.2f}" for m, sd in theirs), f"{theirs[-1][0] - theirs[0][0]:+.2f}"]]
    trained = by_arm(results)
    for split in recipe.tests:
        scores = {arm: [run.scores.get(split, {}) for run in trained.get(arm, [])] for arm in arms}
        ours = [[s[metric].score for s in scores[arm] if metric in s] for arm in arms]
        cells = [f"{format_mean(side)} ({len(side)} seeds)" if side else "not yet run" for side in ours]
        gain = f"{statistics.mean(ours[-1]) - statistics.mean(ours[0]):+.2f}" if all(ours) else ""
        rows.append([f"{split}, here", *cells, gain])
    return markdown_table([metric, *arms, "gain"], rows)


def criterion_options(result: Result) -> dict[str, Scalar]:
    """Return the criterion and its options, which come last on the command line."""
    return dict(dropwhile(lambda option: option[0] != "criterion", result.options.items()))


def criterion_line(result: Result) -> str:
    """Return the criterion and its options as they were on the command line."""
    options = criterion_options(result).items()
    return " ".join(
        f"--{name}" if value is True else f"--{name} {value}" for name, value in options if value is not False
    )


def describe_options(options: dict[str, Scalar]) -> str:
    """Return a criterion and its options in words, such as "cross entropy, label-smoothing 0.1"."""
    words = (
        str(value).replace("_", " ") if name == "criterion" else f"{name} {value}" for name, value in options.items()
    )
    return ", ".join(word.removesuffix(" True") for word in words)


def name_sides(sides: dict[str, Result]) -> str:
    """Return "CANDIDATE against BASELINE", each with the options of the criterion that only it has."""
    (baseline, first), (candidate, second) = ((label, criterion_options(side)) for label, side in sides.items())
    texts = {
        label: describe_options({name: value for name, value in own.items() if other.get(name) != value})
        for label, own, other in ((candidate, second, first), (baseline, first, second))
    }
    return " against ".join(f"{label} ({text})" if text else label for label, text in texts.items())


def training_differences(result: Result, other: Result) -> str:
    """Return the options of fairseq-train, except seed and criterion, and the average in which two results differ."""
    first, second = (
        dict(takewhile(lambda option: option[0] != "criterion", side.options.items())) for side in (other, result)
    )
    names = [name for name in dict.fromkeys([*second, *first]) if name != "seed"]
    differing = [f"{name} {second.get(name, 'unset')}" for name in names if first.get(name) != second.get(name)]
    if result.evaluation.average != other.evaluation.average:
        differing.append(f"{result.evaluation.average} checkpoints averaged")
    return ", ".join(differing)


def all_signatures(results: list[Result]) -> dict[str, str]:
    return {metric: signature for result in results for metric, signature in result.signatures.items()}
