"""Run every sweep in full and write SOAK.md.

    python -m tests.soak                 # all, or what is left of it since an interruption
    python -m tests.soak kills flips     # these alone; SOAK.md keeps what it says of the others
    python -m tests.soak --new           # from the beginning
    python -m tests.soak --minutes 5     # each at most so long
    python -m tests.soak --list
    python -m tests.soak --case kills '["moments", "anew", "tear", 5, "5 write c/.tmp-*"]'

Exit code 1 if a case failed; SOAK.md then tells how to run it again.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys

from tests.soak import report
from tests.soak.registry import SWEEPS
from tests.soak.runner import ROOT, shown, soak


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description="Run every sweep in full and write SOAK.md."
    )
    parser.add_argument("sweeps", nargs="*", help=f"of {', '.join(SWEEPS)}; all by default")
    parser.add_argument("--new", action="store_true", help="forget what was done before")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=2)
    parser.add_argument("--minutes", type=float, default=math.inf, help="for each sweep, at most")
    parser.add_argument("--list", action="store_true", help="the sweeps and their counts")
    parser.add_argument("--case", nargs=2, metavar=("SWEEP", "CASE"), help="run one case again")
    args = parser.parse_args()
    if args.list:
        for name, sweep in SWEEPS.items():
            print(f"{name:10} {len(sweep.cases()):>8,} cases: {sweep.counts}")
        return 0
    if args.case:
        SWEEPS[args.case[0]].check(*json.loads(args.case[1]))
        print("the case passes")
        return 0
    if unknown := set(args.sweeps) - SWEEPS.keys():
        parser.error(f"no sweep {', '.join(sorted(unknown))}: one of {', '.join(SWEEPS)}")
    for stop in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # also where a shell in the background ignores them
        signal.signal(stop, signal.default_int_handler)
    try:
        outcomes = soak(args.sweeps or list(SWEEPS), args.new, args.processes, 60 * args.minutes)
    except KeyboardInterrupt:
        print("interrupted; run it again to go on", file=sys.stderr)
        return 130
    page = ROOT / "SOAK.md"
    page.write_text(report.text(outcomes, page.read_text() if page.exists() else ""))
    print(f"{report.table(outcomes)}\n\nwritten to SOAK.md")
    for name, outcome in outcomes.items():
        for case, why in outcome.failures[:20]:
            print(f"FAILED: python -m tests.soak --case {name} '{shown(case)}'\n  {why[:500]}")
    return int(any(outcome.failures for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
