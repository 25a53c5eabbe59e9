"""A job that is killed at 50 random points and resumed each time on other ranks and workers reads what one that ran
through reads: the same documents in the same packs at the same steps, token for token.

A job without a model (`_resume_job.py`) reads small shards over gloo: three sources, one of them with fewer shards than
ranks, three epochs, two stages of other context and mixture, two texts that cannot be decoded (and could be, once they
are in the journal). It is killed with SIGKILL, in turn all ranks with their workers, all ranks, or one rank and the
rest later: while it starts, after a random step, around the stage change, at the ends of epochs, while the cursor is
written. Every journey from the first step to the end of the data takes ten kills. `--tiny` makes one short journey and
writes no row.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))
from _harness import PAGE, Proof, prove
from _resume_data import COUNT, EPOCHS, SOURCES, SWITCH, open_corpus, write_data
from _resume_job import Job
from _resume_ranks import Ranks

from ringweave.data_pipes.planner import PackPlanner

SEED = 3
#: Kills of a journey, by when they come (see `_moment`).
MOMENTS = ("start", "step", "step", "step", "stage", "stage", "epoch", "epoch", "cursor", "step")
TINY = ("step", "stage", "cursor", "epoch")
#: What at least one kill has to have hit; the first five also in a single journey.
WANTED = (
    "with half-full packs", "inside a shard", "at the stage change", "at an epoch end", "while the cursor was written",
    "while starting", "resumed with a healed text", "others ended by themselves", "in a shared group",
    "killed all", "killed ranks", "killed one", "dp 1", "dp 2", "dp 4", "workers 0", "workers 2",
)  # fmt: skip
#: (dp, ranks of a data group, workers) that a job may resume on.
LAYOUTS = (
    (1, 1, 0), (1, 1, 2), (2, 1, 0), (2, 1, 2), (4, 1, 0), (4, 1, 2), (1, 2, 0), (1, 2, 2), (2, 2, 0), (2, 2, 2),
    (4, 2, 0),
)  # fmt: skip


@dataclass
class Lines:
    """A record: step -> [packs, hashes]. twice: steps recorded more than once, always alike."""

    steps: dict[int, Any] = field(default_factory=dict)
    twice: int = 0

    @classmethod
    def read(cls, out: Path) -> Lines:
        """Raises AssertionError for a step that was recorded twice with other content, or out of order."""
        found = cls()
        for line in (out / "steps.jsonl").read_bytes().split(b"\n")[:-1]:
            entry = json.loads(line)
            step, content = entry["step"], [entry["packs"], entry["sha256"]]
            if step in found.steps:
                found.twice += 1
                assert found.steps[step] == content, f"step {step} was another one the second time"
            assert step <= len(found.steps) + 1, f"step {step} follows step {len(found.steps)}"
            found.steps[step] = content
        return found


def whole(lines: Lines, lengths: Any) -> dict[str, int]:
    """Documents lost and repeated over all epochs, by their pieces alone: each has to be there once, and whole."""
    pieces: dict[tuple[str, int, int], list[tuple[int, int]]] = {}
    for packs, _ in lines.steps.values():
        for pack in packs:
            for source, epoch, sample, start, end in pack:
                pieces.setdefault((source, epoch, sample), []).append((start, end))
    lost = repeated = 0
    for source in SOURCES:
        sizes = [int(x) for s in range(len(lengths.counts(source))) for x in lengths.of(source, s)]
        for epoch in range(EPOCHS):
            for sample, size in enumerate(sizes):
                spans = pieces.pop((source, epoch, sample), [])
                covered = Counter(t for start, end in spans for t in range(start, end))
                lost += len(covered) < size
                repeated += bool(covered) and max(covered.values()) > 1
    return {"lost": lost, "repeated": repeated + len(pieces)}


def epoch_ends(lines: Lines) -> list[int]:
    """Steps at which a source is read for the first time in a new epoch, or for the last time in one."""
    first: dict[tuple[str, int], int] = {}
    last: dict[tuple[str, int], int] = {}
    for step, (packs, _) in sorted(lines.steps.items()):
        for pack in packs:
            for source, epoch, *_ in pack:
                first.setdefault((source, epoch), step)
                last[source, epoch] = step
    return sorted({s for (_, epoch), s in first.items() if epoch} | set(last.values()))


class Journey:
    """One run from the first step to the end, through kills. seen: what the kills were found to have hit."""

    def __init__(self, data: Path, out: Path, reference: Lines, *, rng: random.Random) -> None:
        self.data, self.out, self.reference, self.rng = data, out, reference, rng
        self.ends = epoch_ends(reference)
        self.layout: tuple[int, int, int] | None = None
        self.seen: Counter[str] = Counter()
        out.mkdir()
        shutil.copytree(data, out / "stored")  # tokens of the two texts are stored there once they are healed

    def job(self, *, hold: int = 0, slow: float = 0.0) -> Job:
        """A job on another layout than the last one."""
        self.layout = self.rng.choice([x for x in LAYOUTS if x != self.layout])
        dp, group, workers = self.layout
        store = self.rng.random() < 0.5
        return Job(
            data=str(self.out / "stored" if store else self.data), out=str(self.out), rendezvous="", seed=SEED,
            dp=dp, group=group, workers=workers, depth=self.rng.randrange(4), store=store,
            pause=0.005, hold=hold, slow=slow,
        )  # fmt: skip

    def targets(self, moments: tuple[str, ...]) -> list[tuple[int, str]]:
        """(step after which to kill, why), in order."""
        steps = len(self.reference.steps)
        found = []
        for why in moments:
            if why == "stage":
                at = SWITCH + self.rng.choice((-1, 0, 0, 1))
            elif why == "epoch":
                at = self.rng.choice(self.ends) - self.rng.choice((0, 1))
            else:
                at = self.rng.randrange(1, steps)
            found.append((min(max(1, at), steps - 1), why))
        return sorted(found)

    def kill_at(self, step: int, why: str) -> None:
        """Runs until `step` is recorded and kills the job a random moment later."""
        exact = step if why in ("stage", "epoch") else 0  # the step after it takes long enough to be hit
        ranks = Ranks(self.job(hold=exact, slow=0.02 if why == "cursor" else 0.0))
        how = self.rng.choice(("all", "ranks", "one"))
        if why == "cursor" and how == "one":
            how = "ranks"  # else it might be another rank than the one that writes
        (self.out / "cursor.tmp").unlink(missing_ok=True)
        try:
            if why == "start":
                time.sleep(self.rng.uniform(0.0, 1.5))
            elif not ranks.wait(lambda: self._recorded() >= step):
                raise RuntimeError(f"the job ended before step {step}")
            elif why == "cursor" and not ranks.wait(lambda: (self.out / "cursor.tmp").exists()):
                raise RuntimeError("the job ended before it wrote its cursor")
            else:
                time.sleep(self.rng.uniform(0.0, 0.03))
        finally:
            alone = ranks.kill(how, self.rng)
            workers = ranks.gone()
        self.seen.update([f"killed {how}", f"dp {ranks.job.dp}", f"workers {ranks.job.workers}"])
        self.seen["in a shared group"] += ranks.job.group > 1
        self.seen["others ended by themselves"] += alone
        self.seen["worker processes"] += workers
        self._look(why)

    def _recorded(self) -> int:
        """The last step of the record; 0 before the first."""
        path = self.out / "steps.jsonl"
        if not path.exists():
            return 0
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 65536))
            lines = file.read().split(b"\n")
        return int(json.loads(lines[-2])["step"]) if len(lines) > 1 and lines[-2][:1] == b"{" else 0

    def _look(self, why: str) -> None:
        """What this kill hit, from what it left; every line so far must be right already."""
        if (self.out / "steps.jsonl").exists():
            lines = Lines.read(self.out)
            for step, content in lines.steps.items():
                assert content == self.reference.steps.get(step), f"step {step} differs, first killed: {why}"
        step = self._recorded()
        self.seen["while starting"] += why == "start"
        self.seen["while the cursor was written"] += (self.out / "cursor.tmp").exists()
        self.seen["at the stage change"] += abs(step - SWITCH) <= 1
        self.seen["at an epoch end"] += any(end - 1 <= step <= end for end in self.ends)
        if not (self.out / "cursor.json").exists():
            return
        saved = json.loads((self.out / "cursor.json").read_text())
        corpus = open_corpus(self.data, "", workers=0, store=False)
        planner = PackPlanner.restore(saved["stream"]["planner"], lengths=corpus.lengths)
        self.seen["with half-full packs"] += bool(planner.waiting())
        inside = [c.offset and not c.ended for lane in planner._lanes for c in lane.cursors.values()]
        self.seen["inside a shard"] += any(inside)
        if len(saved["stream"]["quarantine"]["entries"]) == 2:
            (self.out / "healed").touch()  # from now on both texts can be read: the journal must stand
            self.seen["resumed with a healed text"] += 1

    def finish(self) -> Lines:
        """Runs to the end of the data, and once more from there; every rank ends at the same step."""
        for _ in range(2):
            ranks = Ranks(self.job())
            try:
                ranks.wait(lambda: False)
            finally:
                ranks.kill("all", self.rng)
                ranks.gone()
            ends = [
                json.loads((self.out / f"end-{rank}.json").read_text()) for rank in range(ranks.job.world)
            ]
            for path in self.out.glob("end-*.json"):
                path.unlink()
            assert all(end == ends[0] for end in ends), f"ranks end differently: {ends}"
            assert ends[0]["steps"] == len(self.reference.steps), ends[0]["steps"]
            self.seen["journal"] = len(ends[0]["journal"])
        return Lines.read(self.out)


def unbroken(data: Path, out: Path) -> Lines:
    """The record of a job that runs through in one process."""
    out.mkdir()
    ranks = Ranks(Job(data=str(data), out=str(out), rendezvous="", seed=SEED, dp=1, every=50))
    try:
        ranks.wait(lambda: False)
    finally:
        ranks.kill("all", random.Random(0))
    return Lines.read(out)


def run(proof: Proof, folder: Path, *, journeys: int, moments: tuple[str, ...], seed: int) -> None:
    """All journeys; figures and verdicts go to `proof`."""
    data = folder / "data"
    write_data(data)
    reference = unbroken(data, folder / "unbroken")
    lengths = open_corpus(data, "", workers=0, store=False).lengths
    seen: Counter[str] = Counter()
    kills = different = lost = repeated = twice = 0
    for number in range(journeys):
        journey = Journey(
            data, folder / f"journey-{number}", reference, rng=random.Random(1000 * seed + number)
        )
        for step, why in journey.targets(moments):
            began = time.monotonic()
            journey.kill_at(step, why)
            kills += 1
            where = f"journey {number}: killed ({why}) after step {journey._recorded()} on {journey.layout}"
            print(f"{where}, {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
        lines = journey.finish()
        different += sum(lines.steps.get(s) != content for s, content in reference.steps.items())
        different += len(set(lines.steps) - set(reference.steps))
        counts = whole(lines, lengths)
        lost, repeated, twice = lost + counts["lost"], repeated + counts["repeated"], twice + lines.twice
        proof.holds(journey.seen.pop("journal") == 2, "the journal does not hold both texts")
        seen += journey.seen
    proof.found(
        kills=kills, steps=len(reference.steps), packs=COUNT * len(reference.steps), different=different,
        lost=lost, repeated=repeated, steps_made_again=twice, **{k: seen[k] for k in sorted(seen)},
    )  # fmt: skip
    proof.holds(different == 0, f"{different} steps differ from those of the unbroken job")
    proof.holds(lost == 0 and repeated == 0, f"{lost} documents lost, {repeated} repeated")
    for what in WANTED if journeys > 1 else WANTED[:5]:
        proof.holds(seen[what] > 0, f"no kill {what}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="one journey of a few kills; no row is written")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        page = folder / "proofs.md" if options.tiny else PAGE
        claim = "killed 50 times and resumed on other ranks and workers, a job reads the packs of one that ran through"
        with prove("data_resume", claim, page=page) as proof:
            moments, journeys = (TINY, 1) if options.tiny else (MOMENTS, 5)
            run(proof, folder, journeys=journeys, moments=moments, seed=options.seed)


if __name__ == "__main__":
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    main()
