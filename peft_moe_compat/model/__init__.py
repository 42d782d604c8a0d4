"""Reads a live model and changes nothing."""
