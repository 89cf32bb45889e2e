"""Generated malformed input: every kind of file, setting and environment that a user or a disk can supply."""
