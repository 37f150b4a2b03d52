"""What ONNX exports cost and how fast they run, beside other exporters."""
