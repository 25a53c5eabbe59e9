"""`ringweave tokenizer train`: closed forms on the first rank, learned codecs over all ranks torchrun started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringweave.pretrain.errors import ConfigError
from ringweave.tokenizers.errors import DataError

if TYPE_CHECKING:
    from ringweave.tokenizers.fit import FitSizes

Samples = Mapping[str, Iterable[Mapping[str, bytes]]]
#: How long ranks wait for the first one to fit closed forms, and for each other.
WAIT = timedelta(hours=2)


def learnable(text: str) -> list[str]:
    """The codecs of `--learn image,audio`. ConfigError names one that cannot be learned."""
    from ringweave.tokenizers.fit import LEARNABLE

    names = [name.strip() for name in text.split(",") if name.strip()]
    strange = [name for name in names if name not in LEARNABLE]
    if strange:
        raise ConfigError(
            f"--learn: {', '.join(strange)} cannot be learned", fix=f"name some of {', '.join(LEARNABLE)}"
        )
    return names


def _say_nothing(_message: str) -> None:
    pass


def train_set(
    samples: Samples,
    heldout: Samples,
    out: Path,
    *,
    names: Sequence[str],
    latents: Samples | None = None,
    latents_heldout: Samples | None = None,
    steps: int,
    sizes: FitSizes,
    progress: Callable[[str], Any],
) -> dict[str, Any] | None:
    """Fit, learn and measure; {"fitted", "learned", "heldout"}, or None on ranks but the first.

    latents, latents_heldout: sources of any names that "latents" learns from and is measured on, where they are not
    those of `samples` and `heldout`. The vocabulary and its hash in "fitted" are those of the set as it is at the end.
    Every rank of a job (RANK and WORLD_SIZE, as torchrun sets them) calls it; codecs are learned over all of them.
    """
    from ringweave.tokenizers.fit import fit_tokenizers, measure
    from ringweave.tokenizers.set import TokenizerSet

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not names:
        raise ConfigError(
            "closed forms are fitted by one process", fix="add --learn, or start it without torchrun"
        )
    if world > 1:
        import torch.distributed as dist

        from ringweave.parallel.gloo import join_world

        join_world(timeout=WAIT)
    if rank:
        progress = _say_nothing
    fitted = fit_tokenizers(samples, out, sizes=sizes, progress=progress) if rank == 0 else {}
    learned = {}
    if names:
        from ringweave.tokenizers.learn import Schedule  # here, because it imports torch
        from ringweave.tokenizers.learn_run import learn_codecs

        try:
            if world > 1:
                dist.barrier()
            learned = learn_codecs(
                samples, out, names=names, schedule=Schedule(steps=steps), sizes=sizes, latents=latents,
                progress=progress,
            )  # fmt: skip
        except RuntimeError as error:
            from ringweave.parallel.watchdog import is_lost_peer

            if world > 1 and is_lost_peer(error):
                raise DataError(
                    f"rank {rank} stopped: another rank did", fix="read that rank's message"
                ) from error
            raise
    if world > 1:
        dist.destroy_process_group()
    if rank:
        return None
    progress("measuring on held-out records")
    made = TokenizerSet.load(out)
    fitted |= {"vocabulary": made.manifest.size, "hash": made.manifest.hash}
    measured = measure(made, heldout, latents=latents_heldout) if heldout or latents_heldout else {}
    return {"fitted": fitted, "learned": learned, "heldout": measured}
