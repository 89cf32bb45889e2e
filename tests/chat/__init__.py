"""Tests of chat templates as text."""
