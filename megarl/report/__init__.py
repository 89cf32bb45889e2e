"""What happened in a run: its data, findings in words, and a page that shows both."""
