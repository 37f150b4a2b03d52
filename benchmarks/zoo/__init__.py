"""Tiny random models of many families, for tests and for the coverage table.

* `families.tiny_config(model_type)`: the conformance families, every feature on and small enough to matter.
* `causal.causal_config(model_type)`: every causal-LM architecture that transformers registers.
* `popular.full(name)`, `popular.shrunk(name)`: popular checkpoints by their real config fields.
* `build.build(config)`, `build.save(model, folder)`: a random eager CPU model of any of them.
"""
