"""The sections of a configuration, a file each: documented keys, and `check()` for what joins the keys of one."""
