"""Estimate a run before it is queued: bytes by role and phase on every rank, seconds, and layouts that fit."""
