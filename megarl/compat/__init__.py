"""Interfaces of other libraries over megarl's own steps, for scripts that were written for them."""
