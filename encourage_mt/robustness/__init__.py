"""Measure how translations change under noise, and how well confidence detects out-of-distribution text."""
