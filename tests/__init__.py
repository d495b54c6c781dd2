"""A package, so that another one called `tests` among the installed ones does not come before it."""
