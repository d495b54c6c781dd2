"""A study: several trainings that differ in what is named, over several seeds, and their verdict.

config.py     the YAML
study.py      entries, seeds, steps, and the config and folders of each run
graph.py      what is to be done, as commands with their inputs and outputs
reuse.py      what exists and fits
earlier.py    what was made by hand, which is taken over, and what is of another YAML, which is refused
checks.py     what a user can get wrong, found before anything expensive
gc.py         removes pictures that nothing needs any more
run/          runs the commands, and shows how far they are
report/       what the pictures say: study.json, and the page of it
"""
