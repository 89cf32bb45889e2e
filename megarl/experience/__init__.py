"""Rows to learn from, made from responses: collecting them, scoring, shaping, and evaluation by generation."""
