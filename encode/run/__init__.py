"""How columns are filled: shards scheduled, encoded, written and committed."""
