"""encourage_mt: training translation models with the encouraging loss.

`--user-dir encourage_mt` imports this package into a fairseq command. Without fairseq installed, `encourage_mt.loss`
still serves any PyTorch program.
"""

from importlib.util import find_spec

__version__ = "0.1.0"

if find_spec("fairseq"):
    from . import criterion, safe_checkpoints

    safe_checkpoints.install()
    __all__ = ["criterion", "safe_checkpoints"]
