"""Text in, dataset folders out: token shards (`*_train_*.bin`, `*_val_*.bin`), `tokenizer.model`, `manifest.json`."""
