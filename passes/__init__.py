"""The methods: one pass per file, imported as `surgeon.passes.<name>`; no torch at module level."""
