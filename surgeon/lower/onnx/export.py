"""`--target onnx`: a model as one ONNX file or two, replayed in ONNX Runtime before it is kept.

A causal language model has a K/V cache: inputs `input_ids`, `attention_mask`, `position_ids` unless the attention
counts them itself, `past_key_values.{i}.key/value`; outputs `logits`, `present.{i}.key/value`: what transformers.js and
ONNX Runtime GenAI expect. One graph serves prefill and decode. Classifiers and encoders are run once: see
`surgeon.lower.onnx.once`.
Encoder-decoders are two models: see `surgeon.lower.onnx.seq2seq`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from surgeon.atomic import atomic_folder, check_target
from surgeon.errors import UsageError, nearest
from surgeon.graph import Graph
from surgeon.lower.onnx import adapters as apart
from surgeon.lower.onnx import beside, genai, proof, seq2seq, slots, web
from surgeon.lower.onnx import demo as page
from surgeon.lower.onnx import once as run_once
from surgeon.lower.onnx.bind import COPY, Placed, choose, place
from surgeon.lower.onnx.check import Replay
from surgeon.lower.onnx.files import files_of, records
from surgeon.lower.onnx.model import build
from surgeon.lower.onnx.pair import ENCODER
from surgeon.lower.onnx.precision import FAST, Linear
from surgeon.lower.onnx.profiles import DEFAULT, GQA, PORTABLE, STANDARD, Profile, find
from surgeon.lower.onnx.ready import Ready, ready
from surgeon.lower.onnx.web import Layout, layout
from surgeon.resident import peak_bytes
from surgeon.verification import make_probes

FOUR_BIT = ("standard", "bnb4", "int4")
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.float32, "int4": torch.float32}
MODEL, DATA, MANIFEST = "model.onnx", "model.onnx.safetensors", "surgeon.json"


@dataclass(frozen=True)
class OnnxReport:
    """An export.

    Attributes:
        folder: where it is.
        files: what was written, with sizes in bytes.
        precision: "fp32", "fp16", "int8" or "int4".
        opset: the ONNX opset.
        profile: what it was made for, see `surgeon.lower.onnx.profiles`.
        attention: what computes it, "gqa", "fused" or "standard"; in the layers of `fallbacks` it is standard.
        fallbacks: why not what the profile has: reason → paths of the layers.
        weights: where its tensors are, see `surgeon.lower.onnx.bind`.
        linears: of int8 and int4, what became of each linear, see `surgeon.lower.onnx.precision`.
        change: of int8 and int4, ‖found − exact‖ / ‖exact‖ of the outputs in torch, None if it was not asked.
        replay: what ONNX Runtime computed, None if it was not asked.
        seconds: time taken.
        peak_rss_bytes: the process's peak memory so far.
    """

    folder: Path
    files: dict[str, int]
    precision: str
    opset: int
    profile: str
    attention: str
    fallbacks: dict[str, list[str]]
    weights: Placed
    linears: tuple[Linear, ...]
    change: float | None
    replay: Replay | None
    seconds: float
    peak_rss_bytes: int

    @property
    def max_error(self) -> float | None:
        """Largest |Δlogit| against torch, None if it was not measured."""
        return self.replay.max_error if self.replay else None

    @property
    def bound(self) -> float | None:
        """What `max_error` may be."""
        return self.replay.bound if self.replay else None

    @property
    def token_agreement(self) -> float | None:
        """Share of greedy steps with the same token, ties within the error counted as the same."""
        return self.replay.token_agreement if self.replay else None


def export_onnx(
    graph: Graph,
    out: str | Path,
    *,
    profile: str = DEFAULT,
    precision: str = "fp32",
    codes: bool = True,
    four_bit: str = "standard",
    weights: str = "",
    tokenizer: Any = None,
    overwrite: bool = False,
    verify: bool = True,
    adapters: str = apart.MERGE,
    targets: str = "all-linear",
    prefix_slots: bool = False,
    opset: int = PORTABLE,
    given: Mapping[str, Graph] | None = None,
    demo: Path | None = None,
) -> OnnxReport:
    """Write the folder `out` with the model, its configs, its tokenizer and a manifest with replayed probes.

    Adapters are folded into the weights first. Virtual tokens become constants: before the past at every attention of a
    language model, where they were trained in a model that is run once. Inputs, outputs, masks and positions are those
    of the text alone. Weights that are held in codes stay so (see `surgeon.lower.onnx.codes`); adapters that would
    change more than their zero points stay beside them.

    Args:
        graph: a causal language model, an encoder-decoder, a classifier or an encoder, with values.
        out: the new folder.
        profile: the runtimes it is for, one of `surgeon.lower.onnx.profiles.PROFILES`.
        precision: "fp32" or "fp16", of weights, cache and arithmetic; norms and softmax stay fp32. "int8" or "int4":
            linears in integers, decided one by one (`surgeon.lower.onnx.precision`), all else fp32.
        codes: keep codes; without, they are decoded, and the adapters folded in.
        four_bit: NF4 and FP4 as "standard" operators, decoded when the model is loaded, or as "bnb4", MatMulBnb4, which
            stays in 4 bits: for GPUs, on a CPU it is slow. With int8 or int4 they go to 8 bits, unless "bnb4" keeps
            them or "int4" forces them into integers of 4 bits.
        weights: "bind" to the checkpoint's own files or "copy"; "" is bind where that is possible and most of the
            model is the checkpoint's own (see `surgeon.lower.onnx.bind`).
        tokenizer: is written beside the model and makes the probes.
        overwrite: replace an existing folder.
        verify: replay the probes in ONNX Runtime, within fp32 1e-4, fp16 2e-2 of the largest logit; int8 and int4
            within fp32's where activations are not rounded, and `surgeon.lower.onnx.precision.ACTIVATIONS` as they are.
        adapters: "merge" folds them in; "slots" makes them inputs of the model (see `surgeon.lower.onnx.slots`), and
            those of the graph a file of their own; "stacked" lets every row of a batch choose one of several.
        targets: the linears that have slots.
        prefix_slots: standard attention, whatever the profile has, so that prefixes are slots too; without, keys and
            values before the text are what the cache of a GroupQueryAttention starts with.
        opset: 21, which every runtime reads, or 23: attentions, rotary embeddings and RMS norms are ONNX's own
            operators where they compute the same, and nothing is of com.microsoft but what browsers need for integers.
        given: more adapters of the same base, by name, to compile and verify with the export.
        demo: for profile "web": put a page that runs the model beside it, with the runtime of this folder.

    Raises:
        CheckFailed: ONNX Runtime computes something else; nothing is left behind.
        UnsupportedError: a part of the model has no ONNX form, or no place in the profile.
        UsageError: no such precision, profile or opset, or `out` exists.
    """
    began = time.perf_counter()
    made_for = _checked(profile, precision, four_bit, adapters).at(opset)
    check_target(Path(out), overwrite)
    if demo is not None:
        page.check(made_for, tokenizer, graph.task)
    if prefix_slots:
        kind = STANDARD if made_for.attention == GQA else made_for.attention
        made_for = replace(made_for, attention=kind, prefix_slots=True)
    dtype = PRECISIONS[precision]
    made = ready(graph, made_for, dtype, precision, codes, four_bit, adapters, targets)
    form, note = choose(weights, made_for, made.plain, dtype, Path(out).absolute().parent)
    level = 1 if made.chosen is None else FAST
    names = {part: layout(made_for, precision, part) for part in made.parts}
    main = list(names.values())[-1]
    models = [
        (build(part, dtype, four_bit, made_for, turn=form == COPY, level=level), names[name])
        for name, part in made.parts.items()
    ]
    with atomic_folder(out, overwrite=overwrite) as folder:
        placed = _saved(models, made, folder, form, note)
        probes = make_probes(made.plain, tokenizer)
        written = [folder / name.model for name in names.values()]
        checked = proof.of_base(made, written, probes, dtype) if verify else None
        if checked is not None:
            checked.require(str(out))
        change = made.chosen.change(made.exact, probes) if made.chosen and verify else None
        if made.record:
            made.record["adapters"] = apart.put(
                {**apart.own(graph), **(given or {})}, made.record, folder,
                lambda one, fed: proof.of_adapter(made, written, probes, dtype, one, fed) if verify else None,
            )  # fmt: skip
        beside.write_configs(made.plain, folder, tokenizer, dtype)
        if made_for.package == "genai":
            genai.write(made.final, folder, model=MODEL, shared=made.attention == GQA)
        web.describe(folder, made_for, names.values(), precision)
        if demo is not None:
            page.write(folder, main, demo, made.plain.config.model_type, made.record)
        said = beside.manifest(made.plain if made.record else graph, made_for, precision, checked, main.model)
        manifest = said | made.record | _also(made, form, change)
        if ENCODER in names:
            manifest |= {"encoder": names[ENCODER].model, "first": seq2seq.first_tokens(made.plain)}
        manifest["files"] = records(folder, set(placed.files) if checked is None else set())
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n")
        files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files_of(folder)}
    return OnnxReport(
        folder=Path(out), files=files, precision=precision, opset=made_for.opset, profile=profile,
        attention=made.attention, fallbacks=dict(made.fallbacks), weights=placed,
        linears=made.chosen.linears if made.chosen else (), change=change, replay=checked,
        seconds=time.perf_counter() - began,
        peak_rss_bytes=peak_bytes(),
    )  # fmt: skip


def _checked(profile: str, precision: str, four_bit: str, adapters: str) -> Profile:
    """The profile, if all names are known."""
    if precision not in PRECISIONS:
        raise UsageError(f"no precision {precision}", "--precision", f"did you mean {nearest(precision, PRECISIONS)}?")
    if four_bit not in FOUR_BIT:
        raise UsageError(f"no 4-bit form {four_bit}", "--four-bit", f"one of {', '.join(FOUR_BIT)}")
    apart.check_form(adapters)
    return find(profile)


def _saved(models: Sequence[tuple[ir.Model, Layout]], made: Ready, folder: Path, form: str, note: str) -> Placed:
    """Write the models and their tensors."""
    if made.profile.package == web.PACKAGE and not made.once:  # a classifier's head sees no tokens
        for model, _ in models:
            web.keep_last(model)
    placed = place([(model, names.data) for model, names in models], made.plain, folder, form, note)
    for model, names in models:
        if made.record and made.profile.optional_slots:
            slots.make_optional(model)
        ir.save(model, folder / names.model)
    return placed


def _also(made: Ready, form: str, change: float | None) -> dict[str, Any]:
    """What the manifest says of weights, padding, attention and integers."""
    found: dict[str, Any] = {"weights": form, "pad": run_once.pad_of(made.plain)}
    found["attention"] = beside.attention(made.attention, made.fallbacks, made.rotary)
    if made.chosen is not None:
        step = made.chosen.step
        found["quantised"] = {"codes": step.spec() if step else "", "change": change}
        found["quantised"]["linears"] = [asdict(linear) for linear in made.chosen.linears]
    return found
