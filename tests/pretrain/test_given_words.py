"""A diffusion transformer whose words are vectors from the record: batches, config, samples, export, a whole run."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from PIL import Image

from ringweave.data_pipes.pack import Pack, PackPlan, Piece
from ringweave.data_pipes.packing import materialise
from ringweave.data_pipes.shard_writer import ShardWriter
from ringweave.parallel.ring_layout import RingLayout
from ringweave.pretrain import job
from ringweave.pretrain.backbone import diffusion_settings, shape_of
from ringweave.pretrain.config import config_from_dict, load_config
from ringweave.pretrain.dit_batch import DiffusionSettings, collate_diffusion
from ringweave.pretrain.dit_sample import SampleSettings, Wish, guided, sample
from ringweave.pretrain.errors import ConfigError, NonFiniteError
from ringweave.pretrain.evaluate import evaluate_run
from ringweave.pretrain.export import export_run, load_run
from ringweave.pretrain.export_dit import write_diffusers
from ringweave.pretrain.export_proof import document_velocity
from ringweave.pretrain.flow import noise_of
from ringweave.pretrain.import_dit import PRIVATE, read_diffusers
from ringweave.pretrain.layer_pipeline import LayerPipeline
from ringweave.pretrain.memory import parameter_count
from ringweave.pretrain.models.dit import LATENT, NOTHING, WORD, DiT
from ringweave.pretrain.models.dit_positions import Grid
from ringweave.pretrain.sample_dit import sample_diffusion, wish_of
from ringweave.pretrain.synthetic import SyntheticLatents
from ringweave.tokenizers import bare
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.segment import Document
from ringweave.tokenizers.set import TokenizerSet

sys.path.append(str(Path(__file__).parent))

from dit_exports import BOUND, SEEN, SHAPE, close, latents_of, random, vae_codec

E, Z = 24, 16
GIVEN = replace(SHAPE, words=None, head=False)
SETTINGS = DiffusionSettings(drop=0.0, given=E)


@pytest.fixture(scope="module")
def model() -> DiT:
    return random(GIVEN)


def document(seed: int, *, words: int, sizes: tuple[tuple[int, int, bool], ...], width: int = E) -> Document:
    """words 0: no vectors, the empty prompt. sizes: (rows, columns, condition)."""
    rng = np.random.default_rng(seed)
    text = bare.embedding_segment(rng.standard_normal((words, width), dtype=np.float32)) if words else None
    grids = [
        bare.latent_segment(
            rng.standard_normal((1, h, w, Z), dtype=np.float32), layer=n, weight=0.0 if seen else 1.0,
            role="condition" if seen else "target",
        )
        for n, (h, w, seen) in enumerate(sizes)
    ]  # fmt: skip
    return bare.document(f"d{seed}", text, grids)


DOCS = [
    document(0, words=3, sizes=((2, 3, False), (2, 3, True))),
    document(1, words=0, sizes=((3, 1, False),)),
    document(2, words=5, sizes=((1, 2, False),)),
]


def pack_of(documents: list[Document] = DOCS, context: int = 40) -> Pack:
    pieces = tuple(Piece("s", 0, n, 0, len(d)) for n, d in enumerate(documents))
    return materialise(PackPlan(0, context, pieces), lambda piece: documents[piece.sample])


# ---- batches ----


def test_each_word_has_its_vector_and_the_empty_prompt_zeros() -> None:
    batch = collate_diffusion([pack_of()], SETTINGS, channels=Z)
    kinds = [WORD] * 3 + [LATENT] * 12 + [WORD] + [LATENT] * 3 + [WORD] * 5 + [LATENT] * 2
    assert batch.kind[0].tolist() == kinds + [NOTHING] * (40 - len(kinds))
    given = batch.inputs()["embeddings"]
    assert given.shape == (1, 40, E) and given.dtype == torch.float32
    wanted = torch.zeros(40, E)
    wanted[:3] = torch.from_numpy(DOCS[0].segments[0].latents)  # type: ignore[arg-type]
    wanted[19:24] = torch.from_numpy(DOCS[2].segments[0].latents)  # type: ignore[arg-type]
    assert torch.equal(given[0], wanted)
    assert not batch.weights[0, :3].any() and batch.counts[1] == 0 and (batch.targets == -1).all()
    plain = collate_diffusion([pack_of()], replace(SETTINGS, drop=1.0), channels=Z)
    assert plain.vectors is not None and not plain.vectors.any()
    assert plain.kind[0, :4].tolist() == [NOTHING, NOTHING, WORD, LATENT]
    assert plain.documents[0, :4].tolist() == [-1, -1, 0, 0] and plain.order[0, 2] == 0
    fixed = collate_diffusion([pack_of()], replace(SETTINGS, drop=1.0), channels=Z, levels=[0.5])
    assert fixed.vectors is not None and torch.equal(fixed.vectors[0], wanted), "validation drops no words"


def test_ring_ranks_hold_the_vectors_of_their_own_slots() -> None:
    packs = [pack_of(), pack_of(DOCS[::-1])]
    whole = collate_diffusion(packs, SETTINGS, channels=Z)
    assert whole.vectors is not None
    joined = torch.full_like(whole.vectors, torch.nan)
    for rank in range(2):
        part = collate_diffusion(packs, SETTINGS, channels=Z, ring=RingLayout(2), rank=rank)
        assert part.vectors is not None and part.vectors.shape[:2] == part.kind.shape
        joined[part.owner == rank] = part.vectors.flatten(0, 1)
    assert torch.equal(joined, whole.vectors)


def words_as_ids() -> Document:
    corpus = SyntheticLatents(vocab=60, channels=Z)
    number = next(n for n in range(24) if len(corpus.document(Piece("rgba", 0, n, 0, 1)).segments[0]) > 1)
    return corpus.document(Piece("rgba", 0, number, 0, 1))


@pytest.mark.parametrize(
    ("documents", "given", "said"),
    [
        ([words_as_ids()], E, "words as ids, the model reads vectors"),
        ([document(0, words=2, width=7, sizes=((1, 1, False),))], E, "embeddings of 7 numbers, the model reads"),
        (DOCS, 0, "embeddings of 24 numbers, the model reads words as ids"),
        ([document(0, words=2, sizes=((1, 1, True),))], E, "no whole document"),
    ],
)  # fmt: skip
def test_packs_that_a_model_cannot_read(documents: list[Document], given: int, said: str) -> None:
    with pytest.raises(DataError, match=said):
        collate_diffusion([pack_of(documents, 100)], replace(SETTINGS, given=given), channels=Z)


def test_vectors_that_are_not_finite_stop_the_run_by_name() -> None:
    pack = pack_of()
    assert pack.embeddings is not None
    pack.embeddings[4, 2] = np.nan
    with pytest.raises(NonFiniteError, match="embeddings of a document are not finite") as caught:
        collate_diffusion([pack], SETTINGS, channels=Z)
    assert caught.value.where == "s sample 2"


# ---- against stock diffusers, document by document ----


def stock_of(model: DiT) -> QwenImageTransformer2DModel:
    theirs = QwenImageTransformer2DModel(
        patch_size=2, in_channels=Z, out_channels=Z // 4, num_layers=2, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=E, axes_dims_rope=(8, 12, 12),
    ).eval()  # fmt: skip
    theirs.load_state_dict(model.state_dict())
    return theirs


@torch.no_grad()
def test_a_pack_from_records_equals_stock_diffusers_one_by_one(model: DiT) -> None:
    """From documents through packing and collating; words dropped too, where stock code is given one zero vector."""
    theirs = stock_of(model)
    documents = [
        document(n, words=w, sizes=((3, 2, False), (2, 2, False))) for n, w in enumerate((4, 0, 1, 9))
    ]
    pack, empty = pack_of(documents, 70), torch.zeros(1, 1, E)
    for drop in (0.0, 1.0):
        batch = collate_diffusion([pack], replace(SETTINGS, drop=drop), channels=Z)
        given = batch.inputs()
        del given["velocity"], given["targets"]
        ours = model(batch.ids, **given)[0]
        for number, each in enumerate(documents):
            at = (batch.documents[0] == number) & (batch.kind[0] == LATENT)
            told = each.segments[0].latents
            words = empty if told is None or drop else torch.from_numpy(told)[None]
            wanted = theirs(
                batch.latents[0][at][None], words, timestep=batch.sigma[0, number][None],
                img_shapes=[[(1, 3, 2), (1, 2, 2)]], return_dict=False,
            )[0][0]  # fmt: skip
            assert close(ours[at], wanted), (drop, number)


# ---- samples ----


def test_guidance_walks_away_from_one_zero_vector(model: DiT) -> None:
    """One Euler step by hand: v = u + g (c - u), u of one vector of zeros; alone and in a pack alike."""
    words = DOCS[2].segments[0].latents
    settings = SampleSettings(steps=1, guidance=3.0, seed=4)
    wish, true = wish_of(DOCS[2], name="w")
    assert wish.embeddings is words and wish.size == len(DOCS[2]) and len(true) == 1
    [alone] = sample(model, [wish], SETTINGS, settings)
    several = sample(
        model, [wish_of(DOCS[0], name="a")[0], wish_of(DOCS[1], name="b")[0], wish], SETTINGS, settings
    )
    assert close(torch.from_numpy(several[2][0]), torch.from_numpy(alone[0]))
    noise = noise_of(4, "sample/w", 0, 0, (2, Z))
    said = [
        document_velocity(model, wish.grids, vectors, torch.from_numpy(noise), 1.0, preset="bil").numpy()
        for vectors in (torch.from_numpy(words), torch.zeros(1, E))  # type: ignore[arg-type]
    ]
    by_hand = noise - guided(said[0], said[1], settings)
    assert close(torch.from_numpy(alone[0]), torch.from_numpy(by_hand))


@pytest.mark.parametrize(
    ("wish", "given", "said"),
    [
        (Wish("a", [40], [Grid(1, 1)]), E, "words as ids, the model reads vectors of 24"),
        (Wish("a", [], [Grid(1, 1)], embeddings=np.zeros((2, 7), np.float32)), E, r"\[2, 7\]"),
        (Wish("a", [], [Grid(1, 1)], embeddings=np.zeros((0, E), np.float32)), E, r"\[0, 24\]"),
        (Wish("a", [], [Grid(1, 1)], embeddings=np.zeros((2, E), np.float32)), 0, "words as ids"),
    ],
)
def test_wishes_that_a_model_cannot_read(model: DiT, wish: Wish, given: int, said: str) -> None:
    with pytest.raises(DataError, match=said):
        sample(model, [wish], replace(SETTINGS, given=given))


# ---- export and import ----


def test_an_export_has_no_text_encoder_and_says_so(model: DiT, tmp_path: Path) -> None:
    record = write_diffusers(model, tmp_path / "out", preset="bil", codec=vae_codec(), conditions=False)
    assert 0 < record["max_rel_output_diff"] <= BOUND and "max_rel_text_diff" not in record
    assert not (tmp_path / "out" / "text_encoder").exists() and not (tmp_path / "out" / "tokenizer").exists()
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["text_encoder"] == index["tokenizer"] == [None, None]
    assert any("vectors of 24 numbers" in s and "negative_prompt_embeds" in s for s in record["stock_cannot"])
    about = json.loads((tmp_path / "out" / PRIVATE).read_text())
    assert "prompts" not in about and "one of zeros" in about["documents"]
    back = read_diffusers(tmp_path / "out")
    assert back.shape == replace(GIVEN, zero_init=back.shape.zero_init)
    mine = dict(model.named_parameters())
    assert all(torch.equal(mine[name], p) for name, p in back.named_parameters()) and len(mine) > 50
    words = torch.from_numpy(DOCS[2].segments[0].latents)  # type: ignore[arg-type]
    plain = SEEN[:1]
    ours = document_velocity(back, plain, words, latents_of(plain), 0.6, preset="bil")
    theirs = QwenImageTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer").eval()
    with torch.no_grad():
        wanted = theirs(
            latents_of(plain)[None], words[None], timestep=torch.tensor([0.6]),
            img_shapes=[[(1, 4, 4)]], return_dict=False,
        )[0][0]  # fmt: skip
    assert close(ours, wanted)


def test_the_shipped_pipeline_samples_what_the_model_does(model: DiT, tmp_path: Path) -> None:
    write_diffusers(model, tmp_path / "out", preset="bil", codec=vae_codec(), conditions=False)
    pipeline, settings = LayerPipeline.load(tmp_path / "out"), SampleSettings(steps=2, guidance=3.0, seed=4)
    for words in (DOCS[2].segments[0].latents, None):
        wish = Wish("w", [], [Grid(4, 6), Grid(3, 2)], embeddings=words)
        for mine, theirs in zip(
            sample(model, [wish], SETTINGS, settings)[0], pipeline.sample(wish, settings)
        ):
            assert close(torch.from_numpy(theirs), torch.from_numpy(mine))


def test_the_stock_pipeline_samples_what_ours_does(model: DiT, tmp_path: Path) -> None:
    """Two steps with true guidance: given vectors against one of zeros."""
    codec, words = vae_codec(), DOCS[2].segments[0].latents
    assert words is not None
    write_diffusers(model, tmp_path / "out", preset="bil", codec=codec, conditions=False)
    stock = QwenImagePipeline.from_pretrained(tmp_path / "out", text_encoder=None, tokenizer=None)
    stock.set_progress_bar_config(disable=True)
    wish = Wish("w", [], [Grid(4, 6)], embeddings=words)
    noise = torch.from_numpy(noise_of(0, "sample/w", 0, 0, (24, Z)))
    theirs = stock(
        prompt_embeds=torch.from_numpy(words)[None], negative_prompt_embeds=torch.zeros(1, 1, E), true_cfg_scale=3.0,
        height=4 * codec.patch, width=6 * codec.patch, latents=noise[None], num_inference_steps=2,
        sigmas=[1.0, 0.5], output_type="latent",
    ).images[0]  # fmt: skip
    [[ours]] = sample(model, [wish], SETTINGS, SampleSettings(steps=2, guidance=3.0))
    assert close(torch.from_numpy(ours), theirs)


# ---- config ----

BASE = """
run: {name: x, dir: runs/x}
tokenizers: {dir: none}
data: {dir: data, sources: [{name: s, shards: s.tar, plan: ["embeddings", "latents:layers"]}]}
model: {kind: dit, layers: 2, width: 128, heads: 8, words: {given: 24}}
optimizer: {lr: 1e-3}
stages: [{context: 256, tokens: 8K, batch: 2}]
"""
SOURCE = "data.sources={name: s, shards: s.tar, plan: "


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("model.words.layers=1", r"words.layers = 1 with words.given = 24"),
        ("model.words.width=64", r"there is no decoder of words"),
        ("model.words.heads=2", r"words.heads = 2"),
        ("stages.0.words_loss=0.1", r"vectors are no next words"),
        ("model.words.given=0", r"(?s)source 's' has embeddings, and words.given is 0.*set model.words.given"),
        ('data.sources.0.plan=["caption","latents:layers"]', r"(?s)no plan holds embeddings.*words as text"),
        ('data.sources.0.plan=["latents:composite?","latents:layers"]', r"no plan holds embeddings"),
        ('data.sources.0.plan=["embeddings","caption","latents:layers"]', r"in one plan"),
        ("model.words.given=-1", r"greater than or equal to 0|expected"),
    ],
)  # fmt: skip
def test_impossible_configs_are_named(change: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(BASE)
    with pytest.raises(ConfigError, match=said):
        load_config(tmp_path / "c.yaml", [change])


def test_a_config_gives_a_model_without_a_decoder(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(BASE)
    # Heads of no decoder divide by anything.
    config = load_config(tmp_path / "c.yaml", ["stages.0.layout={tp: 8}"])
    shape = shape_of(config, vocab=300, channels=16)
    assert (shape.words, shape.text, shape.head) == (None, 24, False)  # type: ignore[union-attr]
    assert diffusion_settings(config, 0).given == 24
    assert parameter_count(config.model, vocab=300, channels=16)["total"] == shape.parameters
    again = config_from_dict(config.to_dict(), source="again")
    assert again.hash() == config.hash()
    own = load_config(
        tmp_path / "c.yaml", ['data.sources.0.plan=["caption","latents:layers"]', "model.words={}"]
    )
    shape = shape_of(own, vocab=300, channels=16)
    assert parameter_count(own.model, vocab=300, channels=16)["total"] == shape.parameters


# ---- a whole run, from shards to samples ----


def shards_of(folder: Path, stem: str, count: int, *, seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples = {}
    for n in range(count):
        members = {}
        for layer in range(2):
            pixels = rng.integers(0, 256, (8, 8 + 4 * (n % 2), 4), dtype=np.uint8)
            pixels[..., 3] = 255 if layer == 0 else pixels[..., 3]
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            members[f"layer{layer}.png"] = file.getvalue()
        file = io.BytesIO()
        np.save(file, rng.standard_normal((1 + n % 3, E)).astype(np.float16))
        members["embeddings.npy"] = file.getvalue()
        samples[f"k{n}"] = members
    with ShardWriter(folder, stem, shard_bytes=1 << 20) as writer:
        for key, members in samples.items():
            writer.add(key, list(members.items()))
        writer.close()


@pytest.mark.slow
def test_a_run_from_records_trains_evaluates_samples_and_exports(tmp_path: Path) -> None:
    """Shards with embeddings through `train`, `eval`, `sample` (true guidance) and `export`; a prompt is refused."""
    TokenizerSet({"latents": vae_codec()}).save(tmp_path / "tokens")
    for name, count in (("train", 6), ("heldout", 3)):
        shards_of(tmp_path / "data", f"s-{name}", count, seed=len(name))
    (tmp_path / "c.yaml").write_text(
        f"""
run: {{name: x, dir: {tmp_path}/run}}
tokenizers: {{dir: {tmp_path}/tokens}}
data:
  dir: {tmp_path}/data
  workers: {{count: 0}}
  sources:
    - {{name: s, shards: s-train-0000.tar, heldout: s-heldout-0000.tar, plan: ["embeddings", "latents:layers"]}}
    - {{name: m, shards: s-train-0000.tar, plan: ["latents:composite?", "latents:foreground"]}}
model: {{kind: dit, layers: 2, width: 64, heads: 2, words: {{given: {E}}}}}
flow: {{drop_words: 0.3}}
optimizer: {{lr: 1e-3}}
stages: [{{context: 64, tokens: 256, batch: 2}}]
"""
    )
    config = load_config(tmp_path / "c.yaml")
    assert job.main(config) == 0
    run = tmp_path / "run"
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [e["loss"] for e in events if e["event"] == "step"]
    assert len(losses) == 2 and all(np.isfinite(losses))
    found = evaluate_run(run)
    assert "rgba" in json.dumps(found)
    made = sample_diffusion(
        run, (), tmp_path / "drawn", sources=["s"], count=2, settings=SampleSettings(steps=1)
    )
    assert made["samples"][0]["documents"] == 2
    assert len(list((tmp_path / "drawn" / "s" / "made").glob("*/layer1.png"))) == 2
    with pytest.raises(ConfigError, match="cannot read a prompt") as caught:
        sample_diffusion(run, ("a cat",), tmp_path / "no")
    assert caught.value.where == "--prompt" and "no text encoder" in caught.value.why
    record = export_run(run)
    assert record["max_rel_output_diff"] <= BOUND and not (run / "export" / "text_encoder").exists()
    back, model = read_diffusers(run / "export"), load_run(run)[0]
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in back.named_parameters())
