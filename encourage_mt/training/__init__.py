"""Train with fairseq: launch, watch and resume."""
