#!/usr/bin/env python3
"""Fine-tune an encoder-decoder model from Hugging Face on two text files and score it with sacreBLEU.

python finetune.py --model Helsinki-NLP/opus-mt-de-en --train train.de train.en --test test.de test.en --output out

Line n of the second file is the translation of line n of the first. --model is the name or the folder of a model
of one language pair: no language codes are set, which NLLB or mBART-50 need, and no task prefix, which T5 needs.
For the baseline, pass --bonus none (label-smoothed cross entropy) and the same other options.
"""

import argparse
import sys
from pathlib import Path

try:
    import accelerate  # noqa: F401 - Trainer needs it
    import sacrebleu
    import torch
    from transformers import (
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
        set_seed,
    )

    from encourage_mt.arguments import Parser, count, index, positive_number
    from encourage_mt.data.bitext import iterate_pairs
    from encourage_mt.errors import as_user_error, exit_on_user_error
    from encourage_mt.integrations.transformers import EncouragingLossForTrainer
except ImportError as error:
    print(f"finetune.py: error: {error}: pip install -e '.[recipes,transformers]'", file=sys.stderr)
    sys.exit(2)


def read_pairs(files):
    """Return the lines of two parallel files. Raises UserError if one cannot be read or their numbers differ."""
    sources, targets = zip(*iterate_pairs([Path(file) for file in files], [], []), strict=True)
    return list(sources), list(targets)


def tokenize(tokenizer, sources, targets, max_length):
    """Return one dict of input_ids, attention_mask and labels per pair."""
    encoded = tokenizer(sources, text_target=targets, max_length=max_length, truncation=True)
    names = ("input_ids", "attention_mask", "labels")
    return [dict(zip(names, row, strict=True)) for row in zip(*(encoded[name] for name in names), strict=True)]


@torch.inference_mode()
def translate(model, tokenizer, sources, batch_size, beam, max_length):
    """Return the translations of `sources`."""
    model.eval()
    translations = []
    for start in range(0, len(sources), batch_size):
        lines = sources[start : start + batch_size]
        batch = tokenizer(lines, return_tensors="pt", padding=True, truncation=True, max_length=max_length)
        batch = batch.to(model.device)
        keywords = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        tokens = model.generate(**keywords, num_beams=beam, max_new_tokens=max_length)
        translations += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return translations


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name or folder of an encoder-decoder model")
    parser.add_argument("--train", nargs=2, required=True, metavar=("SOURCE", "TARGET"), help="text to train on")
    text = "text to translate, and its reference translation"
    parser.add_argument("--test", nargs=2, required=True, metavar=("SOURCE", "TARGET"), help=text)
    parser.add_argument("--output", required=True, help="folder for the model and the translations")
    text = "none (cross entropy), log, power, cosine or MODULE:NAME (default: log)"
    parser.add_argument("--bonus", default="log", help=text)
    text = "probability above which the log bonus continues linearly, along its tangent (default: 0.5)"
    parser.add_argument("--log-end", type=float, default=0.5, help=text)
    parser.add_argument("--label-smoothing", type=float, default=0.1, help="epsilon of label smoothing (default: 0.1)")
    parser.add_argument("--epochs", type=positive_number, default=3, help="number of epochs (default: 3)")
    parser.add_argument("--lr", type=positive_number, default=5e-5, help="peak learning rate (default: 5e-5)")
    parser.add_argument("--batch-size", type=count, default=16, help="sentences per batch and device (default: 16)")
    parser.add_argument("--accumulate", type=count, default=1, help="batches per update (default: 1)")
    text = "maximum number of tokens per sentence (default: 256)"
    parser.add_argument("--max-length", type=count, default=256, help=text)
    parser.add_argument("--beam", type=count, default=5, help="beam size (default: 5)")
    parser.add_argument("--seed", type=index, default=1, help="random seed (default: 1)")
    with exit_on_user_error("finetune.py"):
        args = parser.parse_args()
        options = {"bonus": args.bonus, "log_end": args.log_end, "label_smoothing": args.label_smoothing}
        try:
            loss = EncouragingLossForTrainer(**options)
        except ValueError as error:
            parser.error(str(error))
        finetune(args, loss)


def finetune(args, loss):
    """Train, write the model and the translations of the test to args.output, and print the scores."""
    set_seed(args.seed)
    train, (sources, references) = read_pairs(args.train), read_pairs(args.test)
    with as_user_error(f"{args.model}: cannot be loaded as an encoder-decoder model"):
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        # without dtype, a half-precision checkpoint would be trained in half precision, which loses small updates
        model = AutoModelForSeq2SeqLM.from_pretrained(args.model, dtype=torch.float32)
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            args.output,
            num_train_epochs=args.epochs,
            learning_rate=args.lr,
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=args.accumulate,
            warmup_steps=0.05,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=tokenize(tokenizer, *train, args.max_length),
        # the collator needs the model to make the decoder's input, because Trainer does not pass labels to the model
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_loss_func=loss,
    )
    trainer.train()
    Path(args.output, "translations.txt").unlink(missing_ok=True)  # of another model
    trainer.save_model()
    tokenizer.save_pretrained(args.output)

    translations = translate(trainer.model, tokenizer, sources, args.batch_size, args.beam, args.max_length)
    Path(args.output, "translations.txt").write_text("".join(f"{line}\n" for line in translations), encoding="utf-8")
    for metric in (sacrebleu.BLEU(), sacrebleu.CHRF()):
        score = metric.corpus_score(translations, [references])
        print(f"{score.name} {score.score:.2f}  {metric.get_signature()}")


if __name__ == "__main__":
    main()
