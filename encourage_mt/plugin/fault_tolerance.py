"""Nothing lost on the way: fairseq-train saves whole checkpoints, resumes from whole ones, and stops on SIGTERM.

fairseq writes a checkpoint aside and renames it, but without fsync, and copies it over checkpoint_last.pt and
checkpoint_best.pt, so that a kill or a full disk leaves half of one. A training that is killed or stopped and started
again ends with the parameters of an undisturbed one, bit for bit on the same CPU.
"""

import errno
import functools
import logging
import os
import re
import shutil
import signal
import sys
import zipfile
import zlib
from pathlib import Path

import torch

from ..errors import first_line

logger = logging.getLogger(__name__)

STOPPED = 128 + signal.SIGTERM  # exit code of a training that saved and stopped because it was asked to
CANNOT_SAVE = 2


def install() -> None:
    """In a fairseq-train or fairseq-hydra-train process: all hooks of this module."""
    from fairseq import checkpoint_utils
    from fairseq_cli import train

    checkpoint_utils.torch_persistent_save = save_whole
    checkpoint_utils.PathManager.copy = staticmethod(copy_whole)
    checkpoint_utils.load_checkpoint = resume_from_whole(checkpoint_utils.load_checkpoint)
    train.validate_and_save = stop_when_asked(train.validate_and_save)


# --- saving


def save_whole(obj, filename: str, async_write: bool = False) -> None:
    """Stands for checkpoint_utils.torch_persistent_save: the file is on disk, whole, or the training ends."""
    with whole_file(filename) as partial, open(partial, "wb") as out:
        torch.save(obj, out)
        on_disk(out)


def copy_whole(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
    """Stands for PathManager.copy, with which save_checkpoint makes checkpoint_last.pt and checkpoint_best.pt."""
    with whole_file(dst_path) as partial:
        shutil.copyfile(src_path, partial)
        with open(partial, "rb+") as out:
            on_disk(out)
    return True


class whole_file:
    """Context: the name of a file to write aside, renamed at the end. If writing fails, nothing of it stays."""

    def __init__(self, path: str):
        self.path, self.partial = path, f"{path}.tmp"

    def __enter__(self) -> str:
        return self.partial

    def __exit__(self, kind, error, traceback):
        if error is None:
            os.replace(self.partial, self.path)
            return
        Path(self.partial).unlink(missing_ok=True)
        if isinstance(error, (OSError, RuntimeError)):  # torch.save reports a failing write as RuntimeError
            reason = "no space left" if getattr(error, "errno", None) == errno.ENOSPC else first_line(error)
            logger.error(
                "cannot save %s: %s. The checkpoints saved before are whole: make room and run the same command again",
                self.path,
                reason,
            )
            sys.exit(CANNOT_SAVE)


def on_disk(out) -> None:
    out.flush()
    os.fsync(out.fileno())


# --- resuming


def resume_from_whole(load_checkpoint):
    """Wraps checkpoint_utils.load_checkpoint: rank 0 mends checkpoint_last.pt, the others wait for it.

    And the batches are those of an undisturbed run: fairseq makes them once a process, with the seed plus the epoch the
    process begins in, so that a resumed run would put other sentences of a length together. Epoch 1 it is for all.
    """

    @functools.wraps(load_checkpoint)
    def mend_and_load(cfg, trainer, **options):
        signal.signal(signal.SIGTERM, note_the_wish)  # here, so that a parent of several ranks can still be ended
        if cfg.restore_file == "checkpoint_last.pt":
            if trainer.data_parallel_rank == 0:
                mend_last(Path(cfg.save_dir), trainer.checkpoint_suffix)
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
        if trainer.task.has_sharded_data("train"):  # another part of the data each epoch, so other batches anyway
            return check_length(load_checkpoint(cfg, trainer, **options), trainer)
        make_batches = trainer.get_train_iterator
        trainer.get_train_iterator = lambda epoch, **settings: make_batches(1, **settings)
        try:
            return check_length(load_checkpoint(cfg, trainer, **options), trainer)
        finally:
            del trainer.get_train_iterator

    return mend_and_load


def check_length(loaded, trainer):
    """`loaded`, unless the training has all its updates already: fairseq would add one before it looks."""
    updates = trainer.get_num_updates()
    if 0 < trainer.cfg.optimization.max_update <= updates:
        logger.info("trained already: %d updates", updates)
        sys.exit(0)
    return loaded


def mend_last(folder: Path, suffix: str = "") -> None:
    """Put the newest whole checkpoint of `folder` in the place of a checkpoint_last.pt that is damaged or missing.

    The damaged one is kept as checkpoint_last.pt.damaged. Ends the process with exit code 2 if none is whole.
    """
    last = folder / f"checkpoint_last{suffix}.pt"
    if last.exists():
        reason = damage(last)
        if reason is None:
            return
        logger.error("%s is damaged (%s)", last, reason)
    others = saved_checkpoints(folder, suffix)
    for path in others:
        reason = damage(path)
        if reason is None:
            if last.exists():
                last.rename(f"{last}.damaged")
            copy_whole(str(path), str(last))
            logger.warning("resuming from %s, the newest whole checkpoint", path)
            return
        logger.error("%s is damaged (%s)", path, reason)
    if last.exists() or others:
        logger.error("no checkpoint in %s is whole: remove them to start over", folder)
        sys.exit(CANNOT_SAVE)


def saved_checkpoints(folder: Path, suffix: str) -> list[Path]:
    """Epoch and update checkpoints, newest first, then checkpoint_best.pt."""
    found = {}
    for path in folder.glob("checkpoint*.pt"):
        match = re.fullmatch(rf"checkpoint(?:_?(\d+)(?:_(\d+))?|_best){re.escape(suffix)}\.pt", path.name)
        if match:
            epoch, updates = match.groups()
            found[path] = (int(epoch or -1), int(updates) if updates else float("inf"))
    return sorted(found, key=found.get, reverse=True)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, None if nothing is: torch writes zip archives with checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        return first_line(error)
    return f"{broken} fails its checksum" if broken else None


# --- stopping

_asked = False


def note_the_wish(signum, frame) -> None:
    global _asked
    _asked = True


def stop_when_asked(validate_and_save):
    """Wraps fairseq_cli.train.validate_and_save, which is called after each update: on SIGTERM save and exit with 143.

    At the end of an epoch what is due then is done first, so that the resumed run lacks no validation.
    """

    @functools.wraps(validate_and_save)
    def save_and_stop(cfg, trainer, task, epoch_itr, valid_subsets, end_of_epoch):
        stop = any_rank_asked(trainer)
        if not stop or end_of_epoch:
            result = validate_and_save(cfg, trainer, task, epoch_itr, valid_subsets, end_of_epoch)
        if not stop:
            return result
        if not end_of_epoch or epoch_itr.epoch % cfg.checkpoint.save_interval:
            from fairseq import checkpoint_utils

            checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, None)
        if trainer.data_parallel_world_size > 1:
            torch.distributed.barrier()  # rank 0 has saved before another rank's end tears the group down
        updates = trainer.get_num_updates()
        saved = "not saved" if cfg.checkpoint.no_save else "all saved: the same command goes on"
        logger.warning("stopped by SIGTERM after %d updates, %s", updates, saved)
        sys.exit(STOPPED)

    return save_and_stop


def any_rank_asked(trainer) -> bool:
    """The ranks stop after the same update, or one would wait for the others for ever."""
    if trainer.data_parallel_world_size == 1:
        return _asked
    wish = torch.tensor(float(_asked), device=trainer.device)
    torch.distributed.all_reduce(wish)
    return bool(wish.item())
