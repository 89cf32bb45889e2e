"""Many runs of one command line: what they vary, which comes next, how they are started, and what they measured."""
