"""What encoding will cost: bytes, hours and money, from a sample of the source."""
