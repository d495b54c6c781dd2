"""What looks at columns and moves them: verify, repair, gc, diff, copy, convert, info."""
