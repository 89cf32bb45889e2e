"""Functions of the user, named in the configuration: found and checked without being run, then loaded."""
