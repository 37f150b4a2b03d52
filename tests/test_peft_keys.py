from __future__ import annotations

import pytest

from surgeon.peft_keys import adapter_key, below, is_parameter, lone_projection, module_sites, targeted_sites, wrappers
from surgeon.sites import EXPERTS, LINEAR, Site


def expert(name: str) -> Site:
    return Site(f"m.experts.{name}", EXPERTS, "m", name, f"m.experts.{name}")


UP, DOWN, Q = expert("gate_up_proj"), expert("down_proj"), Site("m.q_proj", LINEAR, "m", "q", "m.q_proj.weight")
IN = Site("m.attn", LINEAR, "m", "i", "m.attn.in_proj_weight")
OUT = Site("m.attn.out_proj", LINEAR, "m", "o", "m.attn.out_proj.weight")
ORDER = {UP.weight: 0, DOWN.weight: 1, Q.weight: 2, IN.weight: 3, OUT.weight: 4}


def key(site: Site, *sites: Site) -> str:
    return adapter_key(f"model.{site.module}.lora_A.weight", site, sites, ORDER)


def test_the_first_parameter_is_the_innermost() -> None:
    assert key(UP, UP, DOWN, Q) == "model.m.experts.base_layer.lora_A.weight"
    assert key(DOWN, UP, DOWN, Q) == "model.m.experts.lora_A.weight"
    assert key(UP, UP, Q) == "model.m.experts.lora_A.weight"
    assert key(Q, UP, DOWN, Q) == "model.m.q_proj.lora_A.weight"


def test_the_output_projection_is_inside_the_attention() -> None:
    assert key(OUT, IN, OUT) == "model.m.attn.base_layer.out_proj.lora_A.weight"
    assert key(IN, IN, OUT) == "model.m.attn.lora_A.weight"
    assert adapter_key("vera_A", Q, [Q], ORDER) == "vera_A"


def test_tensors_of_the_base_are_below_what_wraps_their_modules() -> None:
    around = wrappers([UP, DOWN, Q, IN, OUT])
    assert below("m.q_proj.bias", around) == "m.q_proj.base_layer.bias"
    assert below("m.experts.gate_up_proj_bias", around) == "m.experts.base_layer.base_layer.gate_up_proj_bias"
    assert below("m.attn.out_proj.bias", around) == "m.attn.base_layer.out_proj.base_layer.bias"
    assert below("m.norm.weight", around) == "m.norm.weight"


def test_targets_are_modules_and_parameters_apart() -> None:
    assert module_sites([UP, DOWN, Q, IN, OUT]) == ["m.q_proj", "m.attn"]
    config = {"target_modules": ["attn"], "target_parameters": ["experts.down_proj"]}
    assert targeted_sites(config, [UP, DOWN, Q, IN, OUT]) == [DOWN.path, IN.path, OUT.path]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("m.experts.down_proj", True),
        ("experts.down_proj", True),
        ("m.my_experts.down_proj", False),
        ("m.experts.down_proj_bias", False),
    ],
)
def test_a_parameter_is_named_by_its_end(name: str, found: bool) -> None:
    assert is_parameter(["experts.down_proj"], name) == found


def test_projections_come_in_pairs() -> None:
    assert lone_projection([IN, Q], [IN, OUT, Q]) == "m.attn"
    assert lone_projection([OUT], [IN, OUT, Q]) == "m.attn"
    assert lone_projection([IN, OUT], [IN, OUT, Q]) == ""
    assert lone_projection([Q], [IN, OUT, Q]) == ""
