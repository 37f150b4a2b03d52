"""What the runtimes that an export is made for have: opset, attention, inputs for adapters, files beside the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from surgeon.errors import UsageError, nearest

STANDARD, GQA = "standard", "gqa"
NBITS, BLOCKS = "nbits", "blocks"


@dataclass(frozen=True)
class Profile:
    """One kind of runtime.

    Attributes:
        name: what users call it.
        opset: the ONNX opset. From 21 on INT4 DequantizeLinear is standard, and every current runtime reads it.
        attention: "standard", matrix products and a softmax; "gqa", com.microsoft.GroupQueryAttention where it computes
            what the model does.
        optional_slots: whether inputs for adapters may be left out; else they are required.
        package: what is written beside the graph: "plain", "genai" (genai_config.json), "transformers.js" (files in
            `onnx/`) or "openvino".
        integers: weights in integers as "nbits", com.microsoft.MatMulNBits, or as "blocks", standard DequantizeLinear.
    """

    name: str
    opset: int
    attention: str
    optional_slots: bool
    package: str
    integers: str = NBITS

    @property
    def contrib(self) -> bool:
        """Whether its runtime is ONNX Runtime itself, which has the operators of com.microsoft."""
        return self.package in ("plain", "genai")


_ALL: Sequence[Profile] = (
    Profile("ort", opset=21, attention=GQA, optional_slots=True, package="plain"),
    Profile("genai", opset=21, attention=GQA, optional_slots=True, package="genai"),
    Profile("web", opset=21, attention=STANDARD, optional_slots=False, package="transformers.js"),
    Profile("openvino", opset=21, attention=STANDARD, optional_slots=False, package="openvino", integers=BLOCKS),
)
PROFILES: dict[str, Profile] = {profile.name: profile for profile in _ALL}
DEFAULT = "ort"


def find(name: str) -> Profile:
    """The profile of a name.

    Raises:
        UsageError: there is none.
    """
    if name not in PROFILES:
        raise UsageError(f"no profile {name}", "--profile", f"did you mean {nearest(name, PROFILES, len(PROFILES))}?")
    return PROFILES[name]
