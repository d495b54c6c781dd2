"""How columns are read: rows into buffers, joins, the order of samples, endless batches."""
