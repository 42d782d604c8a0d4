"""Adapter files: detect, read, convert, write."""
