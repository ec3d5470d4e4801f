"""encourage_mt: training translation models with the encouraging loss.

`--user-dir encourage_mt` imports this package into a fairseq command, where it registers the criterion and makes
checkpoints load safely. Elsewhere nothing of fairseq is imported: `encourage_mt.loss` serves any PyTorch program.
"""

import sys

__version__ = "0.1.0"

if "fairseq" in sys.modules:
    from . import compatibility, criterion, safe_checkpoints

    safe_checkpoints.install()
    compatibility.switch_encoder_fast_path_off()
    __all__ = ["criterion"]
