"""Translate, score, compare and inspect trained models."""
