"""The whole way on this machine: captioned pictures, columns, a study of two VAEs in three training
seeds, and a page that says which VAE did better.

    python -m eval.demo            # everything below demo/, ending with demo/report.html and demo/summary.json

Every step is one of the project's own commands and is printed before it runs; run again, it goes on
where it stopped. demo/reconstructions.html shows what each VAE itself loses.
"""

from __future__ import annotations

from shards.exits import run

from .pipeline import main

if __name__ == "__main__":
    run(main)
