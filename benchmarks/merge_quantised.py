"""What merging an adapter into a quantised base loses: surgeon's ways beside PEFT with bitsandbytes.

    python -m benchmarks.merge_quantised --out benchmarks/merge_quantised.md

A random Llama (hidden 256, 4 layers) is quantised, a random adapter of about 5 % of the weights' size is put on every
linear and merged. Errors are ‖merged − adapted‖ / ‖adapted‖ of the logits of 64 random tokens, and
‖W merged − W adapted‖ / ‖ΔW‖ over the weights of the linears: 1.0 means that as much was lost as the adapter is.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from surgeon import api, run
from surgeon.fold import by_weight, folds, value_of
from surgeon.graph import Graph
from surgeon.lower.saved import Saved, fitted
from surgeon.lower.ways import way_graphs
from surgeon.model import load_model
from surgeon.normal import Base
from surgeon.passes import make

RANK, GROUP = 8, 32
IDS = torch.arange(64).reshape(1, 64) % 500


def base(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def adapted(folder: Path, *steps: Any, wide: torch.dtype = torch.float32) -> Graph:
    """The passes with random values, those of an adapter that changes every weight by about 5 %."""
    graph = api.read(folder)
    values = {name: graph.values[name].to(wide) for name in graph.tensors if graph.tensors[name].persistent}
    values |= {name: graph.values[name] for name in graph.tensors if name not in values}
    graph = run.apply(dataclasses.replace(graph, values=values), *steps)
    generator = torch.Generator().manual_seed(1)
    for name, spec in graph.trainable().items():
        pooled = GROUP if "qalora" in name else 1
        std = 0.012 / pooled**0.25
        value = (torch.randn(spec.shape, generator=generator) * std).to(wide)
        graph.inserted[name] = lambda value=value: value
    return graph


@torch.no_grad()
def logits(graph: Graph) -> torch.Tensor:
    return load_model(graph)(input_ids=IDS).logits.double()


def lost(graph: Graph, weight: Callable[[str], torch.Tensor]) -> tuple[float, float]:
    """‖W merged − W adapted‖ / ‖ΔW‖, and ‖ΔW‖ / ‖W‖, over all linears."""
    wrong = change = size = 0.0
    for name, group in by_weight(graph, folds(graph)).items():
        held, normal = value_of(graph, name).double(), group[0].normal(Base(lambda: torch.zeros(0)))
        assert normal.a is not None
        assert normal.b is not None
        change_of = normal.b.double() @ normal.a.double() * normal.scale
        expected = held + change_of.repeat_interleave(normal.group, -1)
        wrong += float((weight(name).double() - expected).square().sum())
        change += float((expected - held).square().sum())
        size += float(held.square().sum())
    return (wrong / change) ** 0.5, (change / size) ** 0.5


def rows(folder: Path) -> list[tuple[str, str, str, float, float]]:
    found = []
    for bits in (4, 3, 2):
        for wide in (torch.float64, torch.float32):
            dtype = str(wide).removeprefix("torch.")
            qalora = make("qalora", rank=RANK)
            graph = adapted(folder, make("intq", bits=bits, group=GROUP), qalora, wide=wide)
            expected = logits(graph)
            for way, made in way_graphs(graph):
                if way in ("zero-points", "dequant") and isinstance(made, Graph):
                    found.append(("surgeon", f"QA-LoRA, int{bits}, {dtype}", way, *_errors(graph, made, expected)))
                if way == "zero-points" and isinstance(made, Graph) and wide == torch.float32:
                    rounded = fitted(made, Saved(made, "gptq_v2"))
                    kind = "zero-points, rounded to GPTQ's integers (refused)"
                    found.append(("surgeon", f"QA-LoRA, int{bits}, {dtype}", kind, *_errors(graph, rounded, expected)))
    graph = adapted(folder, make("nf4"), make("lora", rank=RANK, targets="all-linear"))
    expected = logits(graph)
    for way, made in way_graphs(graph):
        if isinstance(made, Graph):
            found.append(("surgeon", "LoRA, NF4", way, *_errors(graph, made, expected)))
    found.append(("PEFT + bitsandbytes", "LoRA, NF4", "merge_and_unload", *_peft(folder, graph)))
    return found


def _errors(graph: Graph, made: Graph, expected: torch.Tensor) -> tuple[float, float]:
    error = float((logits(made) - expected).norm() / expected.norm())
    return error, lost(graph, lambda name: value_of(made, name))[0]


@torch.no_grad()
def _peft(folder: Path, graph: Graph) -> tuple[float, float]:
    """The same LoRA merged by PEFT into bitsandbytes' 4-bit weights, before any forward pass."""
    import peft
    from bitsandbytes import functional as bitsandbytes

    with tempfile.TemporaryDirectory() as place:
        saved = load_model(graph).save(Path(place, "work"))
        options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=options)
        merged = peft.PeftModel.from_pretrained(copy.deepcopy(model), saved).merge_and_unload()
        expected = peft.PeftModel.from_pretrained(model, saved)

    def weight(name: str) -> torch.Tensor:
        module = merged.get_submodule(name.removesuffix(".weight"))
        return bitsandbytes.dequantize_4bit(module.weight.data, module.weight.quant_state)

    share = lost(graph, weight)[0]
    found, right = (one(input_ids=IDS).logits.double() for one in (merged, expected))
    return float((found - right).norm() / right.norm()), share


def heading() -> str:
    """What stands before the table, with the versions it was made with."""
    names = ("torch", "peft", "bitsandbytes")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    return f"""# Merging into a quantised base

`python -m benchmarks.merge_quantised --out benchmarks/merge_quantised.md` ({versions}, CPU): random adapters merged by
surgeon, and the LoRA by PEFT with bitsandbytes too. Errors are ‖merged − adapted‖ / ‖adapted‖ of the logits, and
‖W merged − W adapted‖ / ‖ΔW‖ over the weights of the linears: 1.0 means that as much was lost as the adapter is. Norms
of a Llama are computed in fp32, so differences of fp64 weights below that do not reach its logits. `original` is
another model than the adapter was trained on, by the error of the quantisation; so is `requant`, which quantises
original + adapter. PEFT quantises the dequantised weights + adapter again, and merges no QA-LoRA. A merge into the
integer zero points of GPTQ's form would lose what the rows with "refused" say (the base's own zero points, floating
point too, are rounded with the adapter); surgeon measures it and writes nothing.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = base(Path(place, "base"))
        found = rows(folder)
        _, share = lost(
            adapted(folder, make("nf4"), make("lora", rank=RANK, targets="all-linear")), lambda n: torch.zeros(())
        )
    lines = [
        heading(),
        f"‖ΔW‖ / ‖W‖ = {share:.1%}",
        "",
        "| tool | adapter, base | way | logits | of the adapter lost |",
        "|" + "---|" * 5,
    ]
    lines += [f"| {tool} | {kind} | {way} | {error:.1e} | {part:.1e} |" for tool, kind, way, error, part in found]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
