"""Heavy operations, one per file: each next to its plain PyTorch form, so that everything runs without a GPU."""
