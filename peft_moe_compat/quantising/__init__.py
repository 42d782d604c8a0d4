"""Packed expert weights that transformers' own quantisers leave unpacked: how they are made, loaded and saved."""
