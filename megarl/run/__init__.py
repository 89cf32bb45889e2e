"""From a checked configuration to a finished run: its folder and who owns it, its Trainer, its loggers, its ending."""
