"""The kernels: one per file, each with `reference()`, `can_use()`, the kernel and its launch."""
