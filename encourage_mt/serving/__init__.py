"""Use a trained model without fairseq: export it to CTranslate2, and translate raw text with it."""
