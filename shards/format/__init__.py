"""What exists on disk: names, shapes, JSON records, whole files put at once."""
