"""Captioners in other formats: ONNX, the hub layout, 8-bit bundles."""
