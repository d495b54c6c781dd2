"""What a training run will cost: FLOPs, memory, bytes, hours and money."""
