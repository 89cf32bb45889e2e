"""Tests of the algorithms: numbers worked by hand, and numbers other projects returned."""
