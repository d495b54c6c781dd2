"""Samples a second from an object store, over those of plain requests by the same client.

`passes` and `peers` import nothing of ours but `samples` and the peers of the parent folder: they
also run in the environment of the peers. So importing the package itself imports nothing.
"""
