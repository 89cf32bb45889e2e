"""One LightningModule per algorithm: what happens in a step or phase, in order."""
