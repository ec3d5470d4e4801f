"""Prepare corpora: from raw text to binarized data."""
