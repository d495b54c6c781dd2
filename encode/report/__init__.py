"""What was encoded: counts by status, time by stage, how far a run is."""
