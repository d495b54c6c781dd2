"""From checkpoint and prompts to a set of pictures that verifies itself."""
