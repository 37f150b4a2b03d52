"""Fields by hand for the architectures whose sizes no rule can guess."""

from __future__ import annotations

from typing import Any

OVERRIDES: dict[str, dict[str, Any]] = {}
EXTRA_INPUTS: dict[str, dict[str, Any]] = {}
