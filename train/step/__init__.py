"""What happens in a training step, around the model: inputs, engine, EMA, schedule, validation."""
