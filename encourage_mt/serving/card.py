"""Write the model card of an export: data, options, scores with signatures, and limitations."""

import shlex

from ..data.manifest import PreparedData
from ..evaluation.formatting import markdown_table, signature_lines
from ..evaluation.results import Result
from ..recipe import render_options
from .model import Agreement, Model


def model_card(model: Model, agreement: Agreement, data: PreparedData, result: Result) -> str:
    """Return the card as Markdown."""
    metrics = list(result.signatures)
    rows = [
        [split, *(f"{scores[metric].score:.2f}" if metric in scores else "" for metric in metrics)]
        for split, scores in result.scores.items()
    ]
    contained = "" if result.evaluation.temperature == 1 else " (the exported model already contains the temperature)"
    averaged = f"the mean of its last {result.evaluation.average} checkpoints"
    paragraphs = [
        f"# {result.recipe or data.folder.parent.name}: {model.source} to {model.target}",
        f"A translation model, exported by encourage-mt from the run {model.name} ({averaged}).",
        f"```bash\nencourage-mt translate FOLDER < text.{model.source} > text.{model.target}\n```",
        "## Scores",
        f"Scores of the run, translated by {result.evaluation.engine} with {result.evaluation.search}{contained}:",
        markdown_table(["set", *metrics], rows),
        "\n".join(signature_lines(result.signatures)),
        f"This export ({model.quantization}): {agreement.describe()}",
        "## Data",
        "; ".join(f"{split}: {pairs:,} pairs" for split, pairs in data.lines.items()) + ". Made from:",
        "\n".join(f"- {name}: sha256 {source.sha256}" for name, source in data.sources.items()),
        "## Training",
        f"`{shlex.join(render_options(result.options))}`",
        ", ".join(f"{name} {version}" for name, version in result.versions.items()) + f"; scored on {result.machine}.",
        "## Licence",
        "The licence of the training data may also bind this model: some corpora exclude commercial use. Check the "
        "licences of the files above before you share or use it. The software that made it has the MIT licence.",
    ]
    return "\n\n".join(paragraphs) + "\n"
