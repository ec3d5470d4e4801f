"""Measure how translation changes under noise, and whether a model's confidence shows that a text is foreign to it."""
