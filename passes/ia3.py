"""IA³: y = s ⊙ (W x + b), and W (u ⊙ x) + b where feed-forward layers end (Liu et al. 2022, eq. 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from surgeon.errors import UsageError
from surgeon.passes.base import CONV1D, LINEAR, Adapter, Cost

if TYPE_CHECKING:
    import torch

    from surgeon.edit import Edit
    from surgeon.normal import Base, Normal
    from surgeon.sites import Site


@dataclass(frozen=True)
class Ia3(Adapter):
    """One learned vector per linear, 1 at first: on keys and values behind the layer, on feed-forwards before it.

    s: `[out]` scales what the layer returns, its bias too; u: `[in]` what it reads. In the paper the targets are the
    keys, the values and the second layer of every feed-forward, which is where `inputs` belongs.

    Options:
        inputs: which of the targets have u instead of s, in the notation of `targets`.
    """

    name: ClassVar[str] = "ia3"
    peft_type: ClassVar[str] = "IA3"
    peft_lacks: ClassVar[tuple[str, ...]] = ("bias", "layers_pattern", "layers_to_transform")
    kinds: ClassVar[tuple[str, ...]] = (LINEAR, CONV1D)
    learning_rate: ClassVar[float] = 3e-3
    targets: str = "*.{k,v}_proj *.down_proj"
    inputs: str = "*.down_proj"

    @property
    def changes_bias(self) -> bool:
        """s is of the output with its bias."""
        return True

    def at(self, site: Site) -> Ia3:
        """With `inputs` "*" at a site whose input is scaled, else ""."""
        from surgeon.select import matches

        return dataclasses.replace(self, inputs="*" if matches(self.inputs, site.path) else "")

    def cost(self, site: Site) -> Cost:
        """One number per output, or per input."""
        count = site.inp if self.inputs else site.out
        return Cost(trained=count, stored=count)

    def rewrite(self, edit: Edit, site: Site) -> None:
        """x → · u, or y → · s."""
        if self.inputs:
            edit.feed(edit.mul(edit.x, edit.param("u", (site.inp,), "ones")))
        else:
            edit.replace(edit.mul(edit.y, edit.param("s", (site.out,), "ones")))

    def normal(self, params: Mapping[str, torch.Tensor], site: Site, base: Base) -> Normal:
        """u, or s, which scales the bias too."""
        from surgeon.normal import Normal

        if "u" in params:
            return Normal(u=params["u"])
        bias = base.bias()
        return Normal(s=params["s"], bias=None if bias is None else params["s"].float() * bias.float())

    def peft_config(self, sites: Sequence[Site]) -> dict[str, Any]:
        """PEFT's fields; the names of the sites whose input is scaled."""
        return {
            "exclude_modules": None,
            "fan_in_fan_out": any(site.kind == CONV1D for site in sites),
            "feedforward_modules": _ends([site.path for site in sites], {s.path for s in sites if self.at(s).inputs}),
            "init_ia3_weights": True,
        }

    def peft_keys(self, site: Site) -> dict[str, str]:
        """One key, whichever vector it is."""
        return {"u" if self.inputs else "s": f"model.{site.path}.ia3_l"}

    def packed(self, name: str, tensor: torch.Tensor, site: Site) -> torch.Tensor:
        """A row for inputs, a column for outputs."""
        return tensor.reshape((1, -1) if name == "u" else (-1, 1))

    def unpacked(self, name: str, tensor: torch.Tensor, site: Site) -> torch.Tensor:
        """The vector; raises UsageError for a row where PEFT's config says column, and the other way round."""
        size = (1, site.inp) if name == "u" else (site.out, 1)
        if tuple(tensor.shape) != size:
            what = f"{site.path}: the vector is {list(tensor.shape)}, and its place has {list(size)}"
            raise UsageError(what, "feedforward_modules in adapter_config.json", "name its own base with --base")
        return tensor.flatten()

    def peft_unfit(self, task: str) -> str:
        """PEFT's IA³ trains no bias."""
        return "it trains no biases" if self.bias != "none" else ""

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Ia3:
        """PEFT's feed-forward modules: a regular expression, or endings of paths."""
        import re

        given = config.get("feedforward_modules") or []
        if isinstance(given, str):
            return cls(inputs=f"re:{given}")
        return cls(inputs="re:.*(" + "|".join(re.escape(name) for name in sorted(given)) + ")" if given else "")


def _ends(paths: Sequence[str], chosen: set[str]) -> list[str] | str:
    """A regular expression for the chosen paths, by their last names if that is enough; none for none.

    PEFT refuses a list of names that is no part of its list of targets, however that is written.
    """
    import re

    leaves = sorted({path.rpartition(".")[2] for path in chosen})
    if {path for path in paths if path.rpartition(".")[2] in leaves} != chosen:
        return "|".join(re.escape(path) for path in sorted(chosen))
    return r"(.*\.)?(" + "|".join(re.escape(leaf) for leaf in leaves) + ")" if leaves else []
