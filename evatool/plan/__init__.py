"""What a run will need, from closed formulas: memory, time, network, data, disk. No torch, no DeepSpeed."""
