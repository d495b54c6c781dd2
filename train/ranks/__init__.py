"""The processes of a run: their groups, the watchdog, the lock on a run's folder."""
