"""Tables in Markdown: each run, each arm over its seeds, a look inside, and a paper's figures beside ours."""

import shlex
import statistics

from ..evaluation.comparison import HEADLINE, Comparison, Seeds, as_lines, markdown, mean
from ..recipe import Recipe

INSIDE = {
    "valid nll (nats)": lambda a: a["nll"],
    "calibration error": lambda a: a["calibration"]["error"],
    "mean margin (nats)": lambda a: a["margin"]["mean"],
    "energy gap (nats)": lambda a: a["energy"]["gap"],
    "token accuracy": lambda a: a["accuracy"],
    "gradient share of p > 0.5": lambda a: a["gradient"]["well_classified"],
}


def runs_table(results: list[dict]) -> str:
    """A row for each run (its scores.json) and set, signatures beneath."""
    names = metric_names(results)
    rows = []
    for result in results:
        for split, scores in result["scores"].items():
            figures = [f"{scores[name]['score']:.2f}" if name in scores else "" for name in names]
            ratio = f"{scores[HEADLINE]['length_ratio']:.3f}"
            pace = ["", ""]
            if "train_seconds" in result:
                minutes, seconds = divmod(round(result["train_seconds"]), 60)
                pace = [f"{result['target_tokens_per_second']:,.0f}", f"{minutes}:{seconds:02d}"]
            rows.append([result["name"], split, *figures, ratio, *pace])
    header = ["run", "set", *names, "length ratio", "target tokens/s", "training time"]
    return "\n".join([markdown(header, rows), "", *signature_lines(results)])


def arms_table(results: list[dict], comparisons: list[Comparison]) -> str:
    """A row for each arm and test set: mean ± standard deviation over seeds, gain and p where the arm is a candidate.

    Gains are over the first arm and the baselines of `comparisons` of which the arm is the candidate: of the seeds that
    both have, named where those are not all, or of all if they share none. p over sentences is of approximate
    randomization, from the comparisons, with the seeds named where some were not compared. The sets are those of the
    comparisons, or all, valid among them, if there are none. Criterion flags, signatures and setting stand beneath.
    results (scores.json) are of `encourage-mt run`, and differ by criterion and seed alone.
    """
    arms = by_arm(results)
    splits = list(comparisons[0].tests) if comparisons else list(results[0]["scores"])
    names = metric_names(results)
    first = next(iter(arms))
    rows = []
    for arm, group in arms.items():
        compared = {c.baseline: c for c in comparisons if c.candidate == arm and c.baseline in arms}
        baselines = list(dict.fromkeys([*([first] if arm != first else []), *compared]))
        for split in splits:
            sides = [[r["scores"][split][name]["score"] for r in group if name in r["scores"][split]] for name in names]
            gains, over_seeds, over_sentences = [], [], []
            for baseline in baselines:
                tests = compared[baseline].tests[split] if baseline in compared else {}
                gain, seeds = gain_over(arms[baseline], group, split)
                gains.append(f"{baseline}{seeds}: {gain.summary()}")
                over_seeds.append("-" if gain.p is None else f"{gain.p:.3f}")
                over_sentences.append(sentence_tests(tests[HEADLINE].sentence_p if tests else {}, gain))
            cells = [arm, split, str(len(group)), *(mean(side) if side else "" for side in sides)]
            rows.append([*cells, *map("; ".join, (gains, over_seeds, over_sentences))])
    header = ["arm", "set", "seeds", *names, f"gain in {HEADLINE} over", "p over seeds", "p over sentences, by seed"]
    flags = [f"{arm}: `{criterion_flags(group[0])}`  " for arm, group in arms.items()]
    return "\n".join([markdown(header, rows), "", *flags, *signature_lines(results), *setting(results)])


def of_shared_seeds(*sides: dict[int, float]) -> list[dict[int, float]]:
    """Figures by seed of two arms, of the seeds that both have; as they are if they share none."""
    shared = sorted(set(sides[0]) & set(sides[1]))
    return [{seed: side[seed] for seed in shared} for side in sides] if shared else list(sides)


def gain_over(baseline: list[dict], candidate: list[dict], split: str) -> tuple[Seeds, str]:
    """The gain of the seeds that both arms have, or of all if they share none, and ", seed ..." where not all count."""
    sides = [{r["seed"]: r["scores"][split][HEADLINE]["score"] for r in group} for group in (baseline, candidate)]
    compared = of_shared_seeds(*sides)
    of = "" if list(map(len, compared)) == list(map(len, sides)) else f", seed {', '.join(map(str, compared[0]))}"
    return Seeds(HEADLINE, *compared), of


def sentence_tests(p: dict[int, dict[str, float]], gain: Seeds) -> str:
    """p by seed; with the seeds named where not all that the gain is of were tested."""
    tested = sorted(set(p) & set(gain.baseline) & set(gain.candidate))
    of = "" if set(tested) == set(gain.baseline) or not tested else f"seed {', '.join(map(str, tested))}: "
    return of + ", ".join(f"{p[seed]['ar']:.3f}" for seed in tested)


def setting(results: list[dict]) -> list[str]:
    """What the runs share, in words, and what they were trained on; where they differ, each value."""

    def each(part, name):
        values = [result[part].get(name, "?") for result in results]
        return " or ".join(dict.fromkeys(f"{v:,}" if isinstance(v, int) else str(v) for v in values))

    names = ("python", "torch", "fairseq-fixed", "fairseq", "sentencepiece", "subword-nmt", "sacrebleu")
    starts = [start for result in results for start in result["provenance"]["starts"]]
    machines = {
        f"{s['machine']}; " + ", ".join(f"{name} {s['versions'][name]}" for name in names if name in s["versions"])
        for s in starts
    }
    words = shlex.split(results[0]["command"])
    source, target = (words[words.index(f"--{side}-lang") + 1] for side in ("source", "target"))
    hours = [result["train_seconds"] / 3600 for result in results if "train_seconds" in result]
    spent = f"; {sum(hours):.1f} hours in updates, {sum(hours) / len(hours):.2f} a run" if hours else ""
    return [
        f"Setting: {results[0]['recipe']}, {source} to {target}; {each('training', 'arch')}, "
        f"{each('training', 'encoder_layers')}+{each('training', 'decoder_layers')} layers, "
        f"{each('training', 'encoder_embed_dim')} wide; {each('training', 'tokens per update')} tokens per "
        f"update, {each('training', 'updates')} updates; last epoch checkpoints averaged: "
        f"{each('evaluation', 'average')}, beam {each('evaluation', 'beam')}, length penalty "
        f"{each('evaluation', 'lenpen')}.  ",
        f"Trained on: {' or '.join(sorted(machines))}{spent}.  ",
    ]


def inside_table(results: list[dict]) -> str:
    """A row for each arm: mean ± standard deviation of the figures of analysis.py that results have as "inside"."""
    rows = []
    for arm, group in by_arm([result for result in results if "inside" in result]).items():
        figures = [mean([result["inside"][name] for result in group], 3) for name in INSIDE]
        rows.append([arm, str(len(group)), *figures])
    return markdown(["arm", "seeds", *INSIDE], rows)


def curve(records: list[dict]) -> list[dict]:
    """What a log (runs.read_log) says of valid after each epoch: greedy BLEU, and nll in bits per token.

    Of an epoch that stands there twice, because its checkpoint was lost, the last.
    """
    names = {"epoch": "epoch", "updates": "valid_num_updates", "bleu": "valid_bleu", "nll": "valid_nll_loss"}
    ends = {record["epoch"]: record for record in records if "valid_bleu" in record}
    return [{name: float(record[key]) for name, key in names.items()} for record in ends.values()]


def curve_table(results: list[dict]) -> str:
    """A row for each epoch that all have: mean ± deviation of each arm's `curve`, gap of BLEU to the first arm.

    The gap is of the seeds that both arms have, or of all if they share none. Results without a "curve" are left out.
    """
    arms = by_arm([result for result in results if result.get("curve")])
    by_epoch = {
        arm: {r["seed"]: {point["epoch"]: point for point in r["curve"]} for r in group} for arm, group in arms.items()
    }
    epochs = [set(points) for side in by_epoch.values() for points in side.values()]
    rows = []
    for epoch in sorted(set.intersection(*epochs) if epochs else ()):
        sides = [{seed: points[epoch] for seed, points in side.items()} for side in by_epoch.values()]
        bleu, nll = ([{seed: p[name] for seed, p in side.items()} for side in sides] for name in ("bleu", "nll"))
        first, *others = bleu
        pairs = [[statistics.mean(side.values()) for side in of_shared_seeds(first, other)] for other in others]
        gaps = [f"{ours - theirs:+.2f}" for theirs, ours in pairs]
        updates = next(iter(sides[0].values()))["updates"]
        means = [[mean(list(side.values())) for side in figures] for figures in (bleu, nll)]
        rows.append([f"{epoch:.0f}", f"{updates:,.0f}", *means[0], *gaps, *means[1]])
    names = list(arms)
    header = [f"greedy BLEU {arm}" for arm in names] + [f"gap {arm}" for arm in names[1:]]
    return markdown(["epoch", "updates", *header, *(f"nll {arm} (bits)" for arm in names)], rows)


def published_table(recipe: Recipe, results: list[dict]) -> str:
    """The figures that the recipe's `published` names, and beneath them ours, or "not yet run"."""
    published = recipe.published
    metric, theirs = published.metric, list(published.scores.values())
    arms = list(published.scores)
    rows = [[published.source, *(f"{m:.2f} ± {sd:.2f}" for m, sd in theirs), f"{theirs[-1][0] - theirs[0][0]:+.2f}"]]
    ran = by_arm(results)
    for split in recipe.tests:
        scores = {arm: [run["scores"].get(split, {}) for run in ran.get(arm, [])] for arm in arms}
        ours = [[s[metric]["score"] for s in scores[arm] if metric in s] for arm in arms]
        cells = [f"{mean(side)} ({len(side)} seeds)" if side else "not yet run" for side in ours]
        gain = f"{statistics.mean(ours[-1]) - statistics.mean(ours[0]):+.2f}" if all(ours) else ""
        rows.append([f"{split}, here", *cells, gain])
    return markdown([metric, *arms, "gain"], rows)


def inside_figures(analysis: dict) -> dict[str, float]:
    """The figures of `inside_table` from an analysis.json."""
    return {name: figure(analysis) for name, figure in INSIDE.items()}


def criterion_flags(result: dict) -> str:
    """The criterion and its options as the run's command line had them."""
    words = shlex.split(result["command"])
    return shlex.join(words[words.index("--criterion") :])


def by_arm(results: list[dict]) -> dict[str, list[dict]]:
    """{arm: its results}, in order of appearance."""
    return {arm: [r for r in results if r["arm"] == arm] for arm in dict.fromkeys(r["arm"] for r in results)}


def metric_names(results: list[dict]) -> list[str]:
    return list(dict.fromkeys(name for result in results for scores in result["scores"].values() for name in scores))


def signature_lines(results: list[dict]) -> list[str]:
    found = {}
    for scores in (scores for result in results for scores in result["scores"].values()):
        found.update({name: entry["signature"] for name, entry in scores.items()})
    return as_lines(found)
