"""Weights in and out: Hugging Face's families, one declarative file each, and one reader and writer for all of them."""
