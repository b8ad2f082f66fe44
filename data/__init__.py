"""Text in, dataset folders out: shards, tokenizers, the offline corpus, the challenge's download."""
