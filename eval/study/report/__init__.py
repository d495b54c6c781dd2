"""What a study's pictures say, and the page of it.

sets.py       the sets and scores that exist, and what is missing
verdict.py    the verdict in sentences
ledger.py     what it cost
analysis.py   all numbers: study.json
page.py       the page of these numbers
"""
