"""What a method tells of its form in PEFT; `surgeon.peft_files` reads and writes the files. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from surgeon.errors import UsageError

if TYPE_CHECKING:
    import torch

    from surgeon.graph import Graph
    from surgeon.passes.base import Adapter
    from surgeon.sites import Site


class PeftForm:
    """The part of an adapter that knows PEFT.

    Class attributes:
        name: of the method, as in `Pass`.
        peft_type: PEFT's name of the method, "" where PEFT has none.
        peft_bias: PEFT's word for `bias="sites"`.
        peft_lacks: fields that other methods have in PEFT's config, and this one has not.
        peft_kinds: kinds of site that PEFT has the method for; () for all of `kinds`.
        peft_packed: whether PEFT has the method for `nn.MultiheadAttention`.
        peft_prompt: whether PEFT counts it as prompt learning: no targets, and one tensor for all its sites, made of
            their `columns` or `rows`.
        peft_host: PEFT's name of a method whose file can hold this adapter too (`peft_part`), "" for none.
    """

    name: ClassVar[str] = ""
    peft_type: ClassVar[str] = ""
    peft_bias: ClassVar[str] = ""
    peft_lacks: ClassVar[tuple[str, ...]] = ()
    peft_kinds: ClassVar[tuple[str, ...]] = ()
    peft_packed: ClassVar[bool] = False
    peft_prompt: ClassVar[bool] = False
    peft_host: ClassVar[str] = ""

    def peft_config(self, sites: Sequence[Site]) -> dict[str, Any]:
        """The method's own fields of PEFT's `adapter_config.json`, for the sites it was applied to."""
        return {}

    def peft_keys(self, site: Site) -> dict[str, str]:
        """Names given to `edit.param` and `edit.shared` → keys in PEFT's file, without their prefix `base_model.`."""
        return {}

    def peft_copies(self, site: Site) -> tuple[str, ...]:
        """Keys at which PEFT may store what another site's keys hold already."""
        return ()

    def packed(self, name: str, tensor: torch.Tensor, site: Site) -> torch.Tensor:
        """A tensor of `edit.param`, by its name there, as PEFT's file lays it out; asked of the pass at a site."""
        return tensor

    def unpacked(self, name: str, tensor: torch.Tensor, site: Site) -> torch.Tensor:
        """The other way."""
        return tensor

    def peft_takes(self, site: Site) -> bool:
        """Whether PEFT has the method for a site."""
        from surgeon.peft_keys import PACKED

        packed = site.weight.endswith(PACKED)
        return (not self.peft_kinds or site.kind in self.peft_kinds) and (self.peft_packed or not packed)

    def in_peft(self, graph: Graph, owner: str) -> tuple[Graph, Adapter]:
        """The graph with the adapter `owner` as PEFT's files can hold it, and that adapter."""
        return graph, cast("Adapter", self)

    def peft_part(self) -> tuple[str, dict[str, Any]]:
        """As part of the file of a `peft_host`: what stands before the last word of keys, and the fields there."""
        return "", {}

    def peft_unfit(self, task: str) -> str:
        """Why PEFT has no place for what these options do in a model for a task, or "": then our own form is used."""
        return ""

    @property
    def peft_lossy(self) -> bool:
        """Whether PEFT's file holds what the adapter computes and not what it trains: its own tensors go beside it."""
        return False

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Any:
        """The pass a PEFT config describes, apart from its targets; `config` holds no field unknown to surgeon.

        Raises:
            UnsupportedError: the config asks for something this pass does not do; the field is named.
        """
        raise UsageError(f"{cls.name} has no form in PEFT")
