"""encourage_mt: train translation models with the encouraging loss.

`--user-dir encourage_mt` imports this package into a fairseq command, where it registers the criterion and makes
checkpoints load safely. Elsewhere nothing of fairseq is imported: `encourage_mt.loss` works in any PyTorch program.
"""

import sys

from .loss import EncouragingLoss

__all__ = ["EncouragingLoss"]
__version__ = "0.1.0"

if "fairseq" in sys.modules:
    from .plugin import register

    register()
