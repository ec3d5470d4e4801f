"""Make fairseq-train save complete checkpoints, resume from intact ones, and stop on SIGTERM and Ctrl-C.

fairseq writes a checkpoint to a temporary file and renames it, but without fsync, and copies it over checkpoint_last.pt
and checkpoint_best.pt, so that a kill or a full disk can leave half of one. With these hooks, a training that is killed
or stopped and started again ends with the parameters of an undisturbed one, bit for bit on the same CPU with as many
threads, in fp32. The result may differ in fp16 and bf16, with --patience, and with --lr-scheduler reduce_lr_on_plateau:
fairseq does not save their fp32 weights or their counts.
"""

import errno
import functools
import logging
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

from ..atomic import atomic_write
from ..errors import first_line
from .checkpoints import find_corruption, saved_checkpoints
from .worker import SAVED, STOPPED

logger = logging.getLogger(__name__)

CANNOT_SAVE = 2
SAVE_SECONDS = 600  # without a checkpoint, within an epoch; a kill loses at most this much work


def install() -> None:
    """Install all hooks of this module in a fairseq-train or fairseq-hydra-train process."""
    from fairseq import checkpoint_utils
    from fairseq_cli import train

    checkpoint_utils.torch_persistent_save = save_whole
    checkpoint_utils.PathManager.copy = staticmethod(copy_whole)
    checkpoint_utils.load_checkpoint = resume_from_whole(checkpoint_utils.load_checkpoint)
    checkpoint_utils.checkpoint_paths = find_negative_too(checkpoint_utils.checkpoint_paths)
    names = train.main.__globals__  # not the module's: a process that `python -m` spawned has a copy of them
    names["validate_and_save"] = save_and_stop_in_time(names["validate_and_save"])


# --- saving


def save_whole(obj, filename: str, async_write: bool = False) -> None:
    """Replace checkpoint_utils.torch_persistent_save: the complete file is on disk, or the training ends."""
    with exit_if_not_saved(filename), atomic_write(Path(filename), "wb") as out:
        torch.save(obj, out)


def copy_whole(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
    """Replace PathManager.copy, with which save_checkpoint makes checkpoint_last.pt and checkpoint_best.pt."""
    with exit_if_not_saved(dst_path), open(src_path, "rb") as source, atomic_write(Path(dst_path), "wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
    return True


def find_negative_too(checkpoint_paths):
    """Wrap checkpoint_utils.checkpoint_paths, which finds the files of --keep-best-checkpoints by their loss.

    Its pattern has no sign, but this loss may be negative; such files would never be removed.
    """

    @functools.wraps(checkpoint_paths)
    def find(path, pattern=r"checkpoint(\d+)\.pt", **options):
        return checkpoint_paths(path, pattern.replace(r"(\d+\.?\d*)", r"(-?\d+\.?\d*)"), **options)

    return find


@contextmanager
def exit_if_not_saved(path: str):
    """End the process with one line in the log if the block cannot write `path`."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save reports a failing write as RuntimeError
        reason = "no space left" if getattr(error, "errno", None) == errno.ENOSPC else first_line(error)
        logger.error(
            "cannot save %s: %s. The checkpoints saved before are intact: free some space, then run the same command",
            path,
            reason,
        )
        sys.exit(CANNOT_SAVE)


# --- resuming


def resume_from_whole(load_checkpoint):
    """Wrap checkpoint_utils.load_checkpoint: rank 0 restores checkpoint_last.pt, the others wait for it.

    The batches are those of an undisturbed run: fairseq makes them once per process, with the seed plus the epoch in
    which it begins, so a resumed run would batch other sentences together. We always batch as in epoch 1.
    """

    @functools.wraps(load_checkpoint)
    def restore_and_load(cfg, trainer, **options):
        for each in (signal.SIGTERM, signal.SIGINT):  # not earlier, so that a parent of several ranks can be ended
            signal.signal(each, request_stop)
        is_restored = False
        # with a suffix each process has a file of its own, and those of one update belong together
        if cfg.restore_file == "checkpoint_last.pt" and not trainer.checkpoint_suffix:
            if trainer.data_parallel_rank == 0:
                is_restored = restore_last_checkpoint(Path(cfg.save_dir))
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
        # other data each epoch, or other batches with the seed plus the epoch: fairseq alone resumes these correctly
        makes_anew = trainer.task.has_sharded_data("train") or trainer.cfg.dataset.update_epoch_batch_itr
        make_batches = trainer.get_train_iterator

        def batches_as_in_epoch_1(epoch, **settings):
            batches = make_batches(1, **settings)
            data = trainer.task.dataset(trainer.cfg.dataset.train_subset)
            return batches if trainer.task.can_reuse_epoch_itr(data) else make_batches(epoch, **settings)

        if not makes_anew:
            trainer.get_train_iterator = batches_as_in_epoch_1
        try:
            extra_state, epoch_itr = load_checkpoint(cfg, trainer, **options)
        finally:
            if not makes_anew:
                del trainer.get_train_iterator
        if is_restored and cfg.no_last_checkpoints:  # this training will not replace the copy, which would get old
            (Path(cfg.save_dir) / "checkpoint_last.pt").unlink()
        validate_last_epoch(extra_state, epoch_itr, trainer)
        if is_trained(trainer):
            logger.info("trained already: %d updates", trainer.get_num_updates())
            sys.exit(0)
        return extra_state, epoch_itr

    return restore_and_load


def validate_last_epoch(extra_state: dict | None, epoch_itr, trainer) -> None:
    """Validate and save if the training was stopped before the validation that ends an epoch or the training.

    The checkpoint of such a stop has no validation loss, and is at the start of the next epoch or has all updates.
    """
    cfg = trainer.cfg
    if not extra_state or cfg.dataset.disable_validation or extra_state.get("val_loss", 0) is not None:
        return  # fairseq's crash.pt has no val_loss
    position = extra_state["train_iterator"]
    is_end = epoch_itr.epoch > 1 and not epoch_itr.iterations_in_epoch and position.get("iterations_in_epoch") == 0
    is_due = is_end and (epoch_itr.epoch - 1) % cfg.dataset.validate_interval == 0
    if is_due or is_trained(trainer):
        from fairseq_cli import train

        epoch = epoch_itr.epoch - is_end
        logger.info("epoch %d was not validated before the training was stopped", epoch)
        criterion = trainer.get_criterion()
        if hasattr(criterion, "set_weight"):  # to that of the last update
            criterion.set_weight(trainer.get_num_updates() - 1)
        at_end = SimpleNamespace(epoch=epoch, end_of_epoch=lambda: is_end, state_dict=lambda: position)
        validate_and_save = train.main.__globals__["validate_and_save"]
        validate_and_save(cfg, trainer, trainer.task, at_end, cfg.dataset.valid_subset.split(","), is_end)


def is_trained(trainer) -> bool:
    """Return whether the training has made all its updates; fairseq would make one more before it checks."""
    return 0 < trainer.cfg.optimization.max_update <= trainer.get_num_updates()


def restore_last_checkpoint(folder: Path) -> bool:
    """Replace a checkpoint_last.pt that is damaged or missing by the newest intact checkpoint of `folder`.

    The damaged one is kept as checkpoint_last.pt.damaged. Returns whether it was replaced. Ends the process with exit
    code 2 if there are checkpoints, but none is intact.
    """
    last, paths = folder / "checkpoint_last.pt", saved_checkpoints(folder)
    for path in paths:
        reason = find_corruption(path)
        if reason is None:
            if path != last:
                if last.exists():
                    last.rename(f"{last}.damaged")
                copy_whole(str(path), str(last))
                logger.warning("resuming from %s, the newest intact checkpoint", path)
            return path != last
        logger.error("%s is damaged (%s)", path, reason)
    if paths:
        logger.error("no checkpoint in %s is intact: remove all of them to start over", folder)
        sys.exit(CANNOT_SAVE)
    return False


# --- stopping, and saving within an epoch

_stop_requested = False
_last_save = time.monotonic()


class StopTraining(BaseException):
    """Leave a validation before its end."""


def request_stop(signum, frame) -> None:
    global _stop_requested
    _stop_requested = True
    if signum == signal.SIGINT:  # a second Ctrl-C does not wait
        signal.signal(signal.SIGINT, signal.default_int_handler)


def save_and_stop_in_time(validate_and_save):
    """Wrap fairseq_cli.train.validate_and_save, which is called after each update.

    On SIGTERM or Ctrl-C save and exit with 143. A running validation stops after the present batch; the resumed run
    repeats one that belongs to the end of an epoch. Within an epoch that takes long, save checkpoint_last.pt every
    SAVE_SECONDS.
    """

    @functools.wraps(validate_and_save)
    def watched(cfg, trainer, task, epoch_itr, valid_subsets, end_of_epoch):
        global _last_save
        from fairseq import checkpoint_utils

        valid_step = trainer.valid_step

        def valid_step_or_stop(sample, raise_oom=False):
            # with raise_oom, fairseq repeats a batch that ran out of memory on one rank: no other would answer
            if not raise_oom and any_rank(trainer, _stop_requested)[0]:
                raise StopTraining
            return valid_step(sample, raise_oom)

        try:
            stop, is_due = any_rank(trainer, _stop_requested, time.monotonic() - _last_save > SAVE_SECONDS)
            if stop:
                raise StopTraining
            trainer.valid_step = valid_step_or_stop
            losses, ends = validate_and_save(cfg, trainer, task, epoch_itr, valid_subsets, end_of_epoch)
            is_saved = ends or (end_of_epoch and epoch_itr.epoch % cfg.checkpoint.save_interval == 0)
            if is_due and not is_saved:
                checkpoint_utils.save_checkpoint(
                    cfg.checkpoint, trainer, epoch_itr, losses[0] if end_of_epoch else None
                )
            if is_due or is_saved:
                _last_save = time.monotonic()
            return losses, ends
        except StopTraining:
            checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, None)
            if trainer.data_parallel_world_size > 1:
                torch.distributed.barrier()  # rank 0 has saved before another rank's end tears the group down
            if end_of_epoch:
                print_epoch(cfg, epoch_itr)
            unsaved = cfg.checkpoint.no_save or (cfg.checkpoint.no_last_checkpoints and not end_of_epoch)
            saved = "not saved (--no-save or --no-last-checkpoints)" if unsaved else SAVED
            logger.warning("stopped after %d updates; %s", trainer.get_num_updates(), saved)
            sys.exit(STOPPED)
        finally:
            vars(trainer).pop("valid_step", None)

    return watched


def print_epoch(cfg, epoch_itr) -> None:
    """Log the training's figures of the epoch, as fairseq does only after the validation."""
    from fairseq.logging import metrics, progress_bar
    from fairseq_cli import train

    if metrics.get_meter("train", "loss"):
        bar = progress_bar.progress_bar([], log_format=cfg.common.log_format, epoch=epoch_itr.epoch)
        bar.print(train.get_training_stats(metrics.get_smoothed_values("train")), tag="train")


def any_rank(trainer, *values: bool) -> list[bool]:
    """Return which values are true on any rank: all must stop or save at the same step, or one would wait forever."""
    if trainer.data_parallel_world_size == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float, device=trainer.device)
    torch.distributed.all_reduce(sums)
    return sums.bool().tolist()
