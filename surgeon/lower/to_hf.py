"""`--target hf`: a merged Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon import api

if TYPE_CHECKING:
    from surgeon.lower.merge import Merged
    from surgeon.model import SurgeonModel


def export(work: str | Path | SurgeonModel, out: str | Path, **options: Any) -> Merged:
    """Fold the adapters in and write a checkpoint; options are those of `surgeon.merge`."""
    return api.merge(work, out, **options)
