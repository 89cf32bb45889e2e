"""Files in, batches out: records are read, tokenised, masked, ordered, shared out and padded here."""
