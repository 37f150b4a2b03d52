"""LoHa: its formula, PEFT's files both ways, PEFT's own merge bit for bit, and the LoRA that it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.zoo.folders import base_of, captured, folder_of, reference
from benchmarks.zoo.graphs import close, inputs_of, outputs_of, randomised
from surgeon import api, convert, fold, planning, run
from surgeon.errors import UnsupportedError, UsageError
from surgeon.normal import Normal, compose
from surgeon.passes import make
from surgeon.peft_files import write_adapter

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


@pytest.fixture(autouse=True)
def capture_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture is not what is tested here."""
    monkeypatch.setattr("surgeon.peft_load.open_graph", lambda source, **_: captured(source))


def saved(folder: Path, **options: Any) -> Any:
    """PEFT's model with trained matrices of two ranks, and its files."""
    torch.manual_seed(0)
    patterns = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"down_proj": 7}}
    config = peft.LoHaConfig(r=3, alpha=5, target_modules=["k_proj", "down_proj"], task_type="CAUSAL_LM", **patterns)
    for name, value in options.items():
        setattr(config, name, value)
    model = peft.get_peft_model(reference(folder_of("llama")), config)
    for name, parameter in model.named_parameters():
        if "hada_" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
def test_pefts_files_are_read_merged_and_written_back(tmp_path: Path) -> None:
    theirs = saved(tmp_path / "theirs", rank_dropout=0.1, module_dropout=0.1)
    loaded = api.load(tmp_path / "theirs", base=folder_of("llama"))
    ids = inputs_of(loaded.graph)[0]
    assert torch.equal(loaded(input_ids=ids).logits, theirs(input_ids=ids).logits)
    write_adapter(loaded.graph, "loha", loaded.graph.applied[0], tmp_path / "ours")  # type: ignore[arg-type]
    again = peft.PeftModel.from_pretrained(reference(folder_of("llama")), tmp_path / "ours")
    assert torch.equal(again(input_ids=ids).logits, theirs(input_ids=ids).logits)
    files = [load_file(tmp_path / part / "adapter_model.safetensors") for part in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    merged, expected = fold.fold(loaded.graph), theirs.merge_and_unload().state_dict()
    assert all(torch.equal(merged.values[name], expected[name]) for name in merged.tensors if name in expected)


def test_what_it_does_is_a_lora_of_the_square_of_its_rank() -> None:
    graph = randomised(run.apply(base_of("llama")[1], make("loha", rank=3, targets="*.{k,down}_proj")))
    found = convert.to_lora(graph)
    assert found.exact
    assert {site.rank for site in found.sites} == {9}
    assert close(outputs_of(found.graph), outputs_of(graph))
    wide = randomised(run.apply(base_of("llama")[1], make("loha", rank=5, targets="*.k_proj")))
    with pytest.raises(UnsupportedError, match="a whole matrix"):  # 25 is above the 16 outputs
        convert.to_lora(wide)


def test_the_normal_form_is_cut_and_stacked_as_its_matrix_is() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b, a2, b2 = (torch.randn(size, generator=draw) for size in ((3, 8), (6, 3), (3, 8), (6, 3)))
    normal = Normal(0.5, a, b, product=(a2, b2))
    matrix = (b @ a) * (b2 @ a2) * 0.5
    wanted = {
        "whole": (normal, matrix),
        "factors": (normal.factored(), matrix),
        "outputs": (normal.outputs(slice(1, 4)), matrix[1:4]),
        "inputs": (normal.inputs(slice(2, 7)), matrix[:, 2:7]),
        "stacked": (compose(normal, Normal(1.0, a, b)), matrix + b @ a),
    }
    for name, (found, expected) in wanted.items():
        delta = found.delta()
        assert delta is not None
        assert torch.allclose(delta, expected, atol=1e-5), name
    many = Normal(0.5, *(t.expand(2, *t.shape) for t in (a, b)), product=(a2.expand(2, 3, 8), b2.expand(2, 6, 3)))
    delta = many.experts(slice(1, 2)).delta()
    assert delta is not None
    assert torch.allclose(delta[0], matrix, atol=1e-5)


def test_counts_and_limits(tmp_path: Path) -> None:
    base = base_of("llama")[1]
    assert planning.plan(base, make("loha", rank=2, targets="*.k_proj")).trainable_parameters == 4 * 2 * 2 * (32 + 16)
    with pytest.raises(UsageError, match="rank 17 is above the size"):
        run.apply(base, make("loha", rank=17, targets="*.k_proj"))
    with pytest.raises(UsageError, match="rank is 0"):
        make("loha", rank=0)
    graph = run.apply(base_of("gpt2")[1], make("loha", targets="*.c_attn"))
    with pytest.raises(UnsupportedError, match="no loha at a conv1d"):
        write_adapter(graph, "loha", graph.applied[0], tmp_path)  # type: ignore[arg-type]


def test_convolutions_in_factors_are_refused_by_name(tmp_path: Path) -> None:
    saved(tmp_path, use_effective_conv2d=True)
    with pytest.raises(UnsupportedError, match="use_effective_conv2d"):
        api.load(tmp_path, base=folder_of("llama"))
