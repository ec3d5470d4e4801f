#!/usr/bin/env python3
"""Average the last N checkpoints of a run, or the given files, into one checkpoint that fairseq can load."""

import argparse
from pathlib import Path

from encourage_mt.errors import UserError, exit_on_user_error
from encourage_mt.evaluation.averaging import average
from encourage_mt.plugin.checkpoints import last_checkpoints


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    text = "checkpoint files, or the folder of one run"
    parser.add_argument("--inputs", nargs="+", type=Path, required=True, help=text)
    parser.add_argument("--output", type=Path, required=True, help="checkpoint file to write")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--num-epoch-checkpoints", type=int, metavar="N", help="average the last N checkpoint<epoch>.pt")
    text = "average the last N checkpoint_<epoch>_<update>.pt"
    group.add_argument("--num-update-checkpoints", type=int, metavar="N", help=text)
    args = parser.parse_args()
    kind = "epoch" if args.num_epoch_checkpoints is not None else "update"
    count = args.num_epoch_checkpoints if kind == "epoch" else args.num_update_checkpoints
    with exit_on_user_error(parser.prog):
        if count is None:
            paths = args.inputs
            for path in paths:
                if path.is_dir():
                    raise UserError(f"{path} is a directory; choose its checkpoints with --num-epoch-checkpoints N")
        elif len(args.inputs) > 1:
            raise UserError("--num-epoch-checkpoints and --num-update-checkpoints take one run directory as --inputs")
        elif count < 1:
            raise UserError(f"the number of checkpoints must be at least 1, got {count}")
        else:
            paths = last_checkpoints(args.inputs[0], count, kind)
        average(paths, args.output)
        print(f"wrote {args.output}, the average of {' '.join(path.name for path in paths)}")


if __name__ == "__main__":
    main()
