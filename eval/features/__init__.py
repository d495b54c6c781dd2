"""Pictures as features of frozen networks."""
