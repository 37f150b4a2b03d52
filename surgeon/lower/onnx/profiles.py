"""What the runtimes that an export is made for have: opset, attention, inputs for adapters, files beside the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from surgeon.errors import UsageError, nearest

STANDARD, GQA, FUSED = "standard", "gqa", "fused"
NBITS, BLOCKS = "nbits", "blocks"
PORTABLE, NEWER = 21, 23
OPSETS = (PORTABLE, NEWER)


@dataclass(frozen=True)
class Profile:
    """One kind of runtime.

    Attributes:
        name: what users call it.
        opset: the ONNX opset. From 21 on INT4 DequantizeLinear is standard, and every current runtime reads it.
        attention: "standard", matrix products and a softmax; "gqa", com.microsoft.GroupQueryAttention where it computes
            what the model does; "fused", ONNX's own Attention of opset 23 where it does.
        optional_slots: whether inputs for adapters may be left out; else they are required.
        package: what is written beside the graph: "plain", "genai" (genai_config.json), "transformers.js" (files in
            `onnx/`) or "openvino".
        prefix_slots: whether prefixes are slots whatever computes the attention, and not at standard ones alone; else
            keys and values before the text are what a cache starts with.
        integers: weights in integers as "nbits", com.microsoft.MatMulNBits, or as "blocks", standard DequantizeLinear.
    """

    name: str
    opset: int
    attention: str
    optional_slots: bool
    package: str
    prefix_slots: bool = False
    integers: str = NBITS

    @property
    def contrib(self) -> bool:
        """Whether its runtime is ONNX Runtime itself, and operators of com.microsoft are wanted."""
        return self.package in ("plain", "genai") and self.opset == PORTABLE

    def at(self, opset: int) -> Profile:
        """The profile at an opset: with 23 ONNX's own Attention, RotaryEmbedding and RMSNormalization.

        ONNX Runtime's profiles then have nothing of com.microsoft; what browsers need for integers stays.

        Raises:
            UsageError: surgeon does not write that opset.
        """
        if opset not in OPSETS:
            known = " or ".join(map(str, OPSETS))
            raise UsageError(f"surgeon writes no opset {opset}", "--opset", f"--opset {known}")
        if opset == self.opset:
            return self
        return replace(self, opset=opset, attention=FUSED, integers=BLOCKS if self.contrib else self.integers)


_ALL: Sequence[Profile] = (
    Profile("ort", opset=PORTABLE, attention=GQA, optional_slots=True, package="plain"),
    Profile("genai", opset=PORTABLE, attention=GQA, optional_slots=True, package="genai"),
    Profile(
        "web", opset=PORTABLE, attention=STANDARD, optional_slots=False, package="transformers.js", prefix_slots=True
    ),
    Profile(
        "openvino",
        opset=PORTABLE,
        attention=STANDARD,
        optional_slots=False,
        package="openvino",
        prefix_slots=True,
        integers=BLOCKS,
    ),
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
