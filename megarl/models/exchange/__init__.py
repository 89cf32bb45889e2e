"""Import and export of weights: one declarative file per Hugging Face family, and one reader and writer for all."""
