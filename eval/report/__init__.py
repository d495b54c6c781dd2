"""Pages and tables that compare sets of pictures."""
