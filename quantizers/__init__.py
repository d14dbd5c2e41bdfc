"""The mathematics of post-training quantization: grids, methods, and the engine that walks a model.

torch only: no ray, no YAML, no paths. Start with `grid.py`, then one method per file.
"""
