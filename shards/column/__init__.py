"""How a column is made: sources, shards written by one writer each, commits, the lease."""
