"""ONNX: every distinct layer lowered once, joined into one model, replayed before it is kept."""
