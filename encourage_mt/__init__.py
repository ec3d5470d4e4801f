"""encourage_mt: training translation models with the encouraging loss.

`--user-dir encourage_mt` imports this package into a fairseq command, where it registers the criterion and makes
checkpoints load safely. Elsewhere nothing of fairseq is imported: `encourage_mt.loss` serves any PyTorch program.
"""

import sys

__version__ = "0.1.0"


def register() -> None:
    """Make the plugin known to fairseq in this process; done at import where fairseq was imported before."""
    from . import compatibility, criterion, interruption, safe_checkpoints  # noqa: F401 (importing criterion registers)

    safe_checkpoints.install()
    compatibility.switch_encoder_fast_path_off()
    if "fairseq_cli.train" in sys.modules:
        interruption.install()


if "fairseq" in sys.modules:
    register()
