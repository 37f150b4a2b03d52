"""`python -m surgeon`: the command line, also from a clone that is not installed."""

from __future__ import annotations

from surgeon.cli.main import run

if __name__ == "__main__":
    run()
