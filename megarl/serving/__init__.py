"""A reward model behind HTTP: requests in, scores out. Training is not done here, and the client is elsewhere
(`experience/http_scorer.py`)."""
