"""Tests of the whole program, and what they share."""
