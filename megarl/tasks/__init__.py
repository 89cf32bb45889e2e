"""Tasks that need no files: functions that return records, and rewards for them. Examples and tests use them."""
