"""RMS norms as ONNX Runtime's operator: found where they are, and equal."""

from __future__ import annotations

import onnx_ir as ir
import onnxruntime
import torch
from torch import fx

from surgeon.lower.onnx import norms
from surgeon.lower.onnx.parts import lower_part

aten = torch.ops.aten


def written(epsilon: float, *, vector: bool = True) -> tuple[fx.Graph, fx.Node]:
    """A norm as transformers writes it, and its reciprocal root."""
    part = fx.Graph()
    x, weight = part.placeholder("x"), part.placeholder("weight")
    weight.meta["val"] = torch.empty(16 if vector else (3, 16), device="meta")
    call = part.call_function
    wide = call(aten.to.dtype, (x, torch.float32))
    mean = call(aten.mean.dim, (call(aten.pow.Tensor_Scalar, (wide, 2)), [-1], True))
    root = call(aten.rsqrt.default, (call(aten.add.Tensor, (mean, epsilon)),))
    normed = call(aten.type_as.default, (call(aten.mul.Tensor, (wide, root)), x))
    part.output((call(aten.mul.Tensor, (weight, normed)),))
    return part, root


def test_a_norm_is_one_operator_that_computes_it() -> None:
    part, _ = written(1e-3)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 3, 16, generator=generator), torch.randn(16, generator=generator)
    (expected,) = fx.Interpreter(torch.nn.Module(), graph=part).run(x, weight)
    assert norms.fuse(part) == 1
    part.eliminate_dead_code()
    model = lower_part(part, (x, weight), (x, weight), 21)
    assert "SimplifiedLayerNormalization" in {node.op_type for node in model.graph}
    assert "Pow" not in {node.op_type for node in model.graph}
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    (found,) = session.run(None, dict(zip(names, (x.numpy(), weight.numpy()), strict=True)))
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-5)


def test_what_is_no_norm_stays() -> None:
    assert norms.fuse(written(1e-3, vector=False)[0]) == 0
    part, root = written(1e-3)
    with part.inserting_after(root):
        part.call_function(aten.neg.default, (root,))
    assert norms.fuse(part) == 0
