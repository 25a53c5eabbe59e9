"""`ringweave demo`: the whole road once, on real data, with a proof of what it claims.

Data, tokenizers, three stages on four ranks, a SIGKILL in the second stage, resume, export, evaluation,
samples, report. Everything is measured from what the run left on disk, by functions a user can call too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from ringweave.launch import demo_dit
from ringweave.launch.commands_data import load_tokenizers, records_by_source
from ringweave.launch.demo_proof import layout_proof, resume_proof, stage_proof, tokenizer_proof
from ringweave.pretrain.config import RunConfig, load_config
from ringweave.pretrain.errors import StorageError
from ringweave.pretrain.run_folder import read_events, write_json
from ringweave.tokenizers.errors import UserError

RECIPE = Path(__file__).parent / "recipes" / "demo.yaml"
Progress = Callable[..., None]


class DemoFailed(UserError):
    """A part of the demo did not do what it should (exit 1)."""


class PeakMemory:
    """Largest sum of resident memory over this process and all below it, sampled twice a second."""

    def __init__(self) -> None:
        self.gib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(0.5):
            total = 0
            for p in (me, *me.children(recursive=True)):
                try:
                    total += p.memory_info().rss
                except psutil.Error:
                    continue
            self.gib = max(self.gib, total / 2**30)


#: Codecs that are learned beyond their closed form, and the figure that says what it brings. In so few steps pictures
#: gain 0.1 dB, which is not worth their time here.
LEARNED = {"audio": "si_sdr"}
LEARNING_STEPS = 200


class _Steps:
    """Prints `[ 12.3 s] 3/10 what` as the demo moves on."""

    def __init__(self, total: int) -> None:
        self.total, self.number, self.started = total, 0, time.monotonic()
        self.seconds: dict[str, float] = {}
        self._at = self.started

    def __call__(self, what: str) -> None:
        self.number += 1
        print(f"\n[{time.monotonic() - self.started:6.1f} s] {self.number}/{self.total} {what}", flush=True)

    def done(self, key: str) -> None:
        now = time.monotonic()
        self.seconds[key] = round(now - self._at, 1)
        self._at = now


def run_demo(out: Path, progress: Progress) -> dict[str, Any]:
    """Run the demo in `out` (made anew unless it holds something else) and write `out/proof.json`."""
    _make_room(out)
    overrides = [f"run.dir={out}", f"tokenizers.dir={out / 'tokenizers'}", f"data.dir={out / 'data'}"]
    config = load_config(RECIPE, overrides)
    say = _Steps(11)
    with PeakMemory() as memory:
        proof: dict[str, Any] = {}
        data = _data(out, say, progress)
        figures = _tokenizers(out, config, say, progress)
        killed_at = _train(config, out, overrides, say)
        proof |= _after(config, out, say, data, figures, killed_at)
        say(
            "training a diffusion transformer on layered scenes, exporting it to diffusers, cutting drawings out"
        )
        proof["dit"] = demo_dit.run_stage(out, _train_layers)
        say.done("dit")
        proof["seconds"] = round(time.monotonic() - say.started, 1)
        proof["seconds_by_part"] = say.seconds
    proof["peak_rss_gib"] = round(memory.gib, 2)
    proof["ok"] = not _broken(proof)
    write_json(out / "proof.json", proof)
    from ringweave.pretrain.report import write_report

    report = write_report(out)
    _summary(proof, report)
    return proof


def _make_room(out: Path) -> None:
    """Clear an earlier demo; refuse to touch anything that is not one."""
    import shutil

    if out.exists() and any(out.iterdir()):
        if not (out / "demo.marker").exists():
            raise StorageError(
                "the folder is not empty and not an earlier demo", where=str(out), fix="give another --out"
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo.marker").write_text("made by `ringweave demo`, which may delete this folder\n")


def _data(out: Path, say: _Steps, progress: Progress) -> dict[str, Any]:
    from ringweave.data_pipes.demo import build_demo

    say("building real data from installed packages: text, images, layers, scores, audio, video")
    data = build_demo(out / "data", progress=progress)
    for name, counts in data.items():
        if isinstance(counts, dict) and "records" in counts:
            print(f"    {name:6} {counts['records']:5} records, {counts.get('heldout_records', 0)} held out")
    say.done("data")
    return data


def _tokenizers(out: Path, config: RunConfig, say: _Steps, progress: Progress) -> dict[str, Any]:
    """Fit on the train shards and learn two codecs, measure and picture the held-out ones, make every token cache."""
    from ringweave.pretrain.job import open_corpus
    from ringweave.tokenizers.fit import fit_tokenizers
    from ringweave.tokenizers.learn import Schedule
    from ringweave.tokenizers.learn_run import learn_codecs
    from ringweave.tokenizers.manifest import VocabularyManifest
    from ringweave.tokenizers.measure import measure
    from ringweave.tokenizers.show import show

    say(
        f"fitting six tokenizers in closed form, then learning {' and '.join(LEARNED)} for {LEARNING_STEPS} steps "
        f"and an autoencoder of layers for {demo_dit.VAE_STEPS}"
    )
    folder = out / "tokenizers"
    train, heldout = (
        {
            name: some
            for name, some in records_by_source(out / "data", split).items()
            if name != demo_dit.SOURCE
        }
        for split in ("train", "heldout")
    )
    fit_tokenizers(train, folder, progress=progress)
    before = measure(load_tokenizers(folder), {name: heldout[name] for name in LEARNED})
    learn_codecs(
        train, folder, names=list(LEARNED), schedule=Schedule(steps=LEARNING_STEPS), progress=progress
    )
    demo_dit.learn_latents(out, folder, progress)
    tokenizers = load_tokenizers(folder)
    figures = measure(tokenizers, heldout)
    for name, figure in LEARNED.items():
        figures[name][f"{figure}_closed_form"] = before[name][figure]
        print(
            f"    {name}: {before[name][figure]:.2f} dB in closed form, {figures[name][figure]:.2f} dB learned"
        )
    show(tokenizers, heldout, folder / "show")
    write_json(folder / "figures.json", figures)
    say.done("tokenizers")
    say("tokenizing every shard once")
    manifest = VocabularyManifest.load(folder / "tokenizers.json")
    for held in (False, True):
        open_corpus(config, manifest, heldout=held, tokens=True).close()
    say.done("token_caches")
    return figures


def _train(config: RunConfig, out: Path, overrides: list[str], say: _Steps) -> int:
    """Train, kill everything in stage 2 with SIGKILL, and train on. Gives the last step seen before the kill."""
    stages, ranks = len(config.stages), config.world
    say(f"training {config.total_steps} steps, {ranks} ranks, {stages} stages; to be killed in the second")
    process = _start(overrides)
    try:
        killed_at = _kill_in_second_stage(process, config, out)
    finally:
        _kill_tree(process)
    print(f"    every process was killed with SIGKILL after step {killed_at}", flush=True)
    say.done("training_until_killed")
    say("the same command again: it resumes by itself")
    code = _start(overrides).wait()
    if code != 0:
        raise DemoFailed(
            f"training ended with exit code {code}", where=str(out / "logs"), fix="read the rank logs"
        )
    say.done("training_resumed")
    return killed_at


def _train_layers(overrides: list[str]) -> None:
    """Train by the recipe of the diffusion stage to its end."""
    code = _start(overrides, demo_dit.RECIPE).wait()
    if code != 0:
        raise DemoFailed(
            f"training on layers ended with exit code {code}", fix="read the rank logs in dit/logs"
        )


def _start(overrides: list[str], recipe: Path = RECIPE) -> subprocess.Popen[bytes]:
    sets = [part for item in overrides for part in ("--set", item)]
    argv = [sys.executable, "-m", "ringweave.launch.cli", "train", str(recipe), *sets]
    return subprocess.Popen(argv, start_new_session=True)


def _kill_in_second_stage(process: subprocess.Popen[bytes], config: RunConfig, out: Path) -> int:
    """Wait until stage 2 is under way and some steps past a checkpoint, so that work is really lost."""
    every = config.checkpoint.every_steps or 10
    begin = config.stages[0].steps
    target = next(
        s for s in range(begin + max(2, every), begin + 3 * every) if s % every == max(1, every // 2)
    )
    while process.poll() is None:
        steps = [e["step"] for e in read_events(out / "metrics.jsonl") if e.get("event") == "step"]
        if steps and steps[-1] >= target:
            _kill_tree(process)
            return max(e["step"] for e in read_events(out / "metrics.jsonl") if e.get("event") == "step")
        time.sleep(0.1)
    raise DemoFailed(
        f"training ended by itself (exit code {process.returncode}) before it could be killed",
        where=str(out / "logs"),
        fix="read the rank logs",
    )


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the launcher and everything below it, at once."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for p in family:
        try:
            os.kill(p.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    psutil.wait_procs(family[1:], timeout=10)


def _after(
    config: RunConfig, out: Path, say: _Steps, data: dict[str, Any], figures: dict[str, Any], killed_at: int
) -> dict[str, Any]:
    """Export, evaluate, sample, verify; gives proof.json without the totals."""
    from ringweave.pretrain.evaluate import evaluate_run
    from ringweave.pretrain.export import export_run
    from ringweave.pretrain.job import open_corpus
    from ringweave.pretrain.sample import sample_run
    from ringweave.pretrain.verify import run as verify
    from ringweave.tokenizers.manifest import VocabularyManifest

    manifest = VocabularyManifest.load(out / "tokenizers" / "tokenizers.json")
    corpus = open_corpus(config, manifest)
    say("exporting to a Hugging Face Llama folder and loading it with transformers")
    exported = export_run(out)
    say.done("export")
    say("measuring held-out loss by modality")
    heldout = evaluate_run(out)["heldout"]
    say.done("evaluate")
    say("sampling text and an image")
    sample_run(out, [], [], out / "samples")
    say.done("sample")
    say("checking the laws on tiny models over four ranks (ringweave verify --quick)")
    verified = verify(quick=True, world=4, progress=lambda line: print(f"    {line}", flush=True))
    write_json(out / "verify.json", verified)
    say.done("verify")
    counts = {
        name: {
            "records": int(data[name]["records"]),
            "tokens": int(corpus.lengths[name].sum()),
            "heldout_records": int(data[name]["heldout_records"]),
        }
        for name in corpus.lengths
    }
    return {
        "data": counts,
        "tokenizers": tokenizer_proof(figures),
        "stages": stage_proof(out, config),
        "heldout": {m: {k: v[k] for k in ("loss", "unigram_entropy")} for m, v in heldout.items()},
        "resume": resume_proof(out, config, corpus, killed_at),
        "layouts": layout_proof(verified),
        "export": {k: exported[k] for k in ("class", "max_abs_logit_diff")},
    }


def _broken(proof: dict[str, Any]) -> list[str]:
    """Which claims do not hold, in words."""
    bad = [
        f"{m}: held-out loss {v['loss']:.3f} is not below the unigram entropy {v['unigram_entropy']:.3f}"
        for m, v in proof["heldout"].items()
        if not v["loss"] < v["unigram_entropy"]
    ]
    resume, layouts = proof["resume"], proof["layouts"]
    if resume["samples_lost"] or resume["samples_repeated"] or resume["max_loss_diff"]:
        bad.append(f"resume: {json.dumps(resume)}")
    if layouts["max_rel_loss_diff"] > 1e-6 or layouts["max_rel_grad_diff"] > 1e-5:
        bad.append(f"layouts: {json.dumps(layouts)}")
    if proof["export"]["max_abs_logit_diff"] > 1e-5:
        bad.append(f"export: logits differ by {proof['export']['max_abs_logit_diff']:.2e}")
    return bad + demo_dit.broken(proof["dit"])


def _summary(proof: dict[str, Any], report: Path) -> None:
    """What a person reads at the end."""
    r, layouts, export = proof["resume"], proof["layouts"], proof["export"]
    print("\n" + "─" * 78)
    print("held-out loss, nats a token          trained   unigram")
    for modality, v in proof["heldout"].items():
        verdict = "learnt" if v["loss"] < v["unigram_entropy"] else "NOT LEARNT"
        print(f"  {modality:32} {v['loss']:9.3f} {v['unigram_entropy']:9.3f}  {verdict}")
    for s in proof["stages"]:
        speed = f"{s['tokens_per_s']:7.0f} tokens/s, fill {s['fill']:.1%}"
        print(f"stage    context {s['context']:5} on {s['layout']:8} {s['steps']:4} steps, {speed}")
    print(
        f"resume   killed at step {r['killed_at_step']}, {r['steps_trained_twice']} steps trained twice; samples lost "
        f"{r['samples_lost']}, repeated {r['samples_repeated']}; losses differ by {r['max_loss_diff']:g}"
    )
    loss, grad = layouts["max_rel_loss_diff"], layouts["max_rel_grad_diff"]
    print(f"layouts  loss within {loss:.1e}, gradients within {grad:.1e} of one process")
    print(f"export   {export['class']} in transformers, logits within {export['max_abs_logit_diff']:.1e}")
    print(demo_dit.summary(proof["dit"]))
    print(f"took     {proof['seconds']:.0f} s, peak memory {proof['peak_rss_gib']:.1f} GiB")
    for line in _broken(proof):
        print(f"BROKEN   {line}")
    print(f"report   {report}\nproof    {report.parent / 'proof.json'}")
