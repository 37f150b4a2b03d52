"""The server: one base model and thousands of adapters over one pool of memory (Sheng et al. 2023, S-LoRA)."""
