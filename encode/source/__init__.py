"""What is encoded: tars, their rows, pictures decoded ahead, tars downloaded."""
