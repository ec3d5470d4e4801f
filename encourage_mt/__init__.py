"""encourage_mt: train translation models with the encouraging loss.

`--user-dir encourage_mt` imports this package into a fairseq command, where it registers the criterion and makes
checkpoints load safely. In other programs it does not import fairseq: `encourage_mt.loss` works in any PyTorch program.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loss import EncouragingLoss

__all__ = ["EncouragingLoss"]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """Import the loss, and torch with it, on first use."""
    if name == "EncouragingLoss":
        from .loss import EncouragingLoss

        return EncouragingLoss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if "fairseq" in sys.modules:
    from .plugin import register

    register()
