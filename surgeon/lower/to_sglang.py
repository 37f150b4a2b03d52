"""`--target sglang`: see `surgeon.lower.engines`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.lower.engines import EngineReport, export_for

if TYPE_CHECKING:
    from surgeon.model import SurgeonModel


def export(work: str | Path | SurgeonModel, out: str | Path, **options: Any) -> EngineReport:
    """Write the adapter for this engine; options are those of `export_for`."""
    return export_for("sglang", work, out, **options)
