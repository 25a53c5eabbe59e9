"""Groups of gloo with one worker thread live through what kills torch's, which have two (parallel/gloo.py).

Four functional all-gathers are under way at a time on two ranks, for a minute in a group as ringweave makes it, then in
one as torch makes it until a rank dies, a minute at most. Whether torch's dies is a figure, no condition: once it no
longer does, parallel/gloo.py may go. `--tiny` runs seconds and writes no row.
"""

from __future__ import annotations

import os
import time

from _gloo_race import race
from _harness import arguments, prove_with

from ringweave.parallel.spawn import WorkersFailed, run_ranks


def main() -> None:
    options = arguments(__doc__, tiny="six seconds each").parse_args()
    seconds = 6.0 if options.tiny else 60.0
    claim = (
        "four all-gathers under way at a time for a minute kill no rank where gloo's groups have one worker"
    )
    with prove_with(options, "gloo_workers", claim) as proof:
        proof.found(all_gathers=min(run_ranks(2, race, seconds, 1, timeout=seconds + 100)))
        started = time.monotonic()
        try:
            proof.found(
                torchs=f"lived, {min(run_ranks(2, race, seconds, 2, timeout=seconds + 100))} all-gathers"
            )
        except WorkersFailed as error:
            after = time.monotonic() - started
            proof.found(torchs=f"after {after:.0f} s with the start {str(error).splitlines()[0]}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
