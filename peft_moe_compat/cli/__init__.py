"""The commands: check, inspect, convert, verify, bench, demo."""
