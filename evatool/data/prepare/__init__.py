"""Sources of samples for `evatool data-prepare`, and what is written beside the shards."""
