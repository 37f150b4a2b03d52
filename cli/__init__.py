"""The command line: one command per file, imported as `surgeon.cli.<command>`; no torch at module level."""
