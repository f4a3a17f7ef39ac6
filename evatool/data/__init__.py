"""Pictures and captions: preparation into shards, loading for training, evaluation sets."""
