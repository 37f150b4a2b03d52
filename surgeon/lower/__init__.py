"""Lowering: one file per target, from a final graph to what production runs."""
