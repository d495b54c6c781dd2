"""What a run says of itself: metrics, loggers, its page."""
