"""The whole way on this machine: captioned pictures, columns, two models, a report that says which VAE
did better.

    python -m eval.demo            # everything below demo/, ending with demo/report.html

Every step is one of the project's own commands and is printed before it runs; run again, it goes on
where it stopped.
"""

from __future__ import annotations

from configs import run

from .pipeline import main

if __name__ == "__main__":
    run(main)
