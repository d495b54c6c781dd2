"""What a column's latents decode to: themselves, what lies between two of them, and what is lost."""
