"""Pictures and captions as people have them -> sorted tars that `encode` reads."""
