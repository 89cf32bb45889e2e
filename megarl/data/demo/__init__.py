"""The demo set: small tasks that a small byte model starts to learn within a minute on a CPU."""
