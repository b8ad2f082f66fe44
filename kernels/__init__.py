"""Heavy operations, one per file: each beside its plain PyTorch form, so that everything runs without a GPU."""
