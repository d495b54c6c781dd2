"""Distances between sets of pictures: FID, KID, CMMD and others."""
