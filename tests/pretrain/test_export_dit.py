"""Diffusers folders of ours: what stock classes load from them, and what is refused."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, LlamaModel

from ringweave.data_pipes.layer_tasks import TASKS
from ringweave.pretrain import export_dit, verify_dit
from ringweave.pretrain.config import config_from_dict
from ringweave.pretrain.errors import ConfigError, StorageError
from ringweave.pretrain.export import export_run, load_run
from ringweave.pretrain.export_dit import export_diffusion, scheduler_settings, write_diffusers
from ringweave.pretrain.export_proof import document_velocity
from ringweave.pretrain.flow import FlowSettings, shift_of, shifted
from ringweave.pretrain.import_dit import PRIVATE, read_diffusers
from ringweave.pretrain.layer_pipeline import LayerPipeline
from ringweave.pretrain.models.dit import DiT
from ringweave.pretrain.models.dit_positions import Grid
from ringweave.pretrain.models.lwm import LWM
from ringweave.pretrain.run_folder import RunFolder
from ringweave.pretrain.stock_positions import (
    cannot_say,
)
from ringweave.pretrain.synthetic import SyntheticLatents
from ringweave.pretrain.trainer import Trainer
from ringweave.tokenizers.latent_codec import LatentCodec
from ringweave.tokenizers.manifest import BOS
from ringweave.tokenizers.set import TokenizerSet
from ringweave.tokenizers.text import TextCodec

# Test modules are imported one by one (import mode "importlib"), so shared helpers need a path of their own.
sys.path.append(str(Path(__file__).parent))

from dit_exports import BOUND, SEEN, SHAPE, WORDS, close, latents_of, random, stock_velocity

# ---- ours, loaded by stock classes ----


def test_stock_classes_give_our_velocities(model: DiT, layered: Path) -> None:
    ids = torch.tensor([BOS, 40, 7, 55, 7])
    ours = document_velocity(model, SEEN, ids, latents_of(SEEN), 0.7, preset="bil")
    assert close(ours, stock_velocity(layered, SEEN, ids, 0.7))
    plain = SEEN[:2]
    ours = document_velocity(model, plain, ids, latents_of(plain), 0.2, preset="bil")
    assert close(ours, stock_velocity(layered, plain, ids, 0.2, use_layer3d_rope=False))
    assert not close(ours, stock_velocity(layered, plain, ids, 0.2)), "the rope of a folder would not matter"
    record = json.loads((layered / "export.json").read_text())
    assert 0 < record["max_rel_output_diff"] <= BOUND
    assert record["max_rel_text_diff"] <= BOUND
    assert record["max_abs_vae_diff"] == 0
    assert record["class"] == "QwenImageTransformer2DModel"
    assert record["parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("preset", "sign", "conditions", "rope"),
    [
        ("bil", 1, True, True),
        ("bil", 1, False, False),
        ("bil", -1, True, False),
        ("layer3d", 1, True, True),
        ("msrope", 1, True, False),
    ],
)
def test_every_way_to_count_layers_is_proven_on_documents_of_its_own(
    model: DiT, preset: Any, sign: int, conditions: bool, rope: bool, tmp_path: Path
) -> None:
    record = write_diffusers(model, tmp_path / "out", preset=preset, sign=sign, conditions=conditions)
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert config["use_layer3d_rope"] is rope
    assert config["in_channels"] == 16 and config["out_channels"] == 4 and config["patch_size"] == 2
    assert 0 < record["max_rel_output_diff"] <= BOUND
    assert record["stock_cannot"][: -2 if rope else -1] == cannot_say(preset=preset, sign=sign, layered=rope)


def test_a_model_that_begins_as_the_identity_exports(tmp_path: Path) -> None:
    """All velocities are 0: no quotient of nothing."""
    model = DiT(replace(SHAPE, words=None, head=False))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(model.initial_value(name, tuple(p.shape), seed=0))
    assert write_diffusers(model.eval(), tmp_path / "out", preset="bil")["max_rel_output_diff"] == 0
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["text_encoder"] == index["vae"] == [None, None]


def test_the_text_encoder_is_a_llama_with_our_hidden_states_and_head(model: DiT, layered: Path) -> None:
    ids = torch.arange(50) % 60
    assert model.words is not None and model.words.head is not None
    with torch.no_grad():
        ours, _ = model.words(
            ids, order=torch.arange(50), documents=torch.zeros(1, 50, dtype=torch.int32), owner=None
        )
        theirs = LlamaModel.from_pretrained(layered / "text_encoder")(ids[None]).last_hidden_state[0]
        logits = LlamaForCausalLM.from_pretrained(layered / "text_encoder")(ids[None]).logits[0]
    assert close(ours, theirs)
    assert close(ours @ model.words.head.weight.t(), logits)


def test_shards_hold_at_most_so_many_bytes_and_load_alike(model: DiT, layered: Path, tmp_path: Path) -> None:
    write_diffusers(model, tmp_path / "out", preset="bil", shard_bytes=300_000)
    folder = tmp_path / "out" / "transformer"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    found = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert len(found) > 5
    assert sorted(found) == [
        f"diffusion_pytorch_model-{n + 1:05d}-of-{len(found):05d}.safetensors" for n in range(len(found))
    ]
    for tensors in found.values():
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 300_000
    assert index["weight_map"] == {key: name for name, tensors in found.items() for key in tensors}
    whole = load_file(layered / "transformer" / "diffusion_pytorch_model.safetensors")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    theirs = QwenImageTransformer2DModel.from_pretrained(folder).state_dict()
    assert theirs.keys() == whole.keys()
    assert all(torch.equal(theirs[name], value) for name, value in whole.items())
    one = json.loads((layered / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(one["weight_map"].values()) == {"diffusion_pytorch_model.safetensors"}


@pytest.mark.parametrize("shift", ["exponential", "linear", "none"])
def test_the_stock_scheduler_shifts_levels_as_the_run_did(shift: Any) -> None:
    flow = FlowSettings(shift=shift, shift_from=(64, 0.3), shift_to=(2048, 1.1), shift_base=100)
    scheduler = FlowMatchEulerDiscreteScheduler(**scheduler_settings(flow))
    levels = np.linspace(1.0, 0.1, 10)
    for tokens in (100, 1600):  # where the line through two points is the square root, too
        config = scheduler.config
        slope = (config.max_shift - config.base_shift) / (
            config.max_image_seq_len - config.base_image_seq_len
        )
        mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
        scheduler.set_timesteps(sigmas=levels, mu=mu)
        ours = [shifted(float(level), shift_of(tokens, flow)) for level in levels]
        assert np.allclose(scheduler.sigmas[:-1].numpy(), ours, atol=1e-6), (shift, tokens)


def test_the_stock_pipeline_samples_what_ours_does(model: DiT, codec: LatentCodec, tmp_path: Path) -> None:
    """model_index.json, scheduler, VAE and statistics: two Euler steps of QwenImagePipeline, and the picture."""
    write_diffusers(model, tmp_path / "out", preset="bil", codec=codec, conditions=False)
    stock = QwenImagePipeline.from_pretrained(tmp_path / "out", tokenizer=None)
    stock.set_progress_bar_config(disable=True)
    ours, grids = LayerPipeline.load(tmp_path / "out"), [Grid(4, 6)]
    words, noise = ours.words(torch.tensor([BOS, 9, 30])), latents_of(grids)
    given = {
        "prompt_embeds": words[None], "height": 4 * codec.patch, "width": 6 * codec.patch, "latents": noise[None],
        "num_inference_steps": 2, "true_cfg_scale": 1.0,
    }  # fmt: skip
    theirs = stock(**given, output_type="latent").images[0]
    x, factor = noise, shift_of(24, FlowSettings())
    levels = [shifted(level, factor) for level in (1.0, 0.5)] + [0.0]
    for level, after in itertools.pairwise(levels):
        x = x + (after - level) * ours.velocity(x, level, grids=grids, words=words)
    assert close(x, theirs)
    image = np.asarray(stock(**given, output_type="pil").images[0])
    picture = codec.decode(x.reshape(4, 6, 16).numpy())
    assert image.shape == (4 * codec.patch, 6 * codec.patch, 4)
    assert np.abs(image.astype(int) - picture).max() <= 1


# ---- refusals ----


@pytest.mark.parametrize(
    ("changes", "options", "where", "why"),
    [
        ({"streams": "single"}, {}, "model.streams", "no stock class"),
        ({"axes": (4, 4, 12, 12)}, {}, "model.axes", "4 axes"),
        ({}, {"preset": "msrope", "sign": -1}, "model.sign", "count up"),
        ({}, {"preset": "layer3d", "sign": -1}, "model.sign", "count up"),
        ({"axes": (9, 11, 12)}, {}, "model.axes", "pairs of channels"),
        ({"theta": 5e5}, {}, "theta", "10000, not 500000"),
        ({"mlp": 2}, {}, "mlp", "factor 4, not 2"),
        ({"channels": 6, "out": 6}, {}, "latents", "6 channels in"),
    ],
)
def test_models_without_a_stock_class_are_refused(
    changes: dict[str, Any], options: dict[str, Any], where: str, why: str, tmp_path: Path
) -> None:
    with torch.device("meta"):
        model = DiT(replace(SHAPE, **changes))
    with pytest.raises(ConfigError, match="cannot be exported to diffusers") as caught:
        write_diffusers(model, tmp_path / "out", **{"preset": "bil"} | options)
    assert caught.value.where == where and why in caught.value.why and "ringweave" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_export_is_seen_and_leaves_nothing(model: DiT, monkeypatch: Any, tmp_path: Path) -> None:
    right = export_dit.words_name
    swap = {"q_proj": "k_proj", "k_proj": "q_proj"}

    def wrong(name: str, *, head: bool) -> str:
        said = right(name, head=head)
        return next((said.replace(a, b) for a, b in swap.items() if a in said), said)

    monkeypatch.setattr(export_dit, "words_name", wrong)
    with pytest.raises(StorageError, match="max_rel_output_diff is") as caught:
        write_diffusers(model, tmp_path / "out", preset="bil")
    assert "max_rel_text_diff is" in caught.value.why
    monkeypatch.undo()
    broken = random()
    with torch.no_grad():
        broken.get_parameter("proj_out.bias")[3] = float("nan")
    with pytest.raises(StorageError, match="max_rel_output_diff is nan"):
        write_diffusers(broken, tmp_path / "out", preset="bil")
    assert list(tmp_path.iterdir()) == []


def test_only_an_export_is_replaced(model: DiT, codec: LatentCodec, copy: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ConfigError, match="holds something else"):
        write_diffusers(model, tmp_path / "mine", preset="bil")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    write_diffusers(model, copy, preset="msrope")
    assert not (copy / "vae").exists()
    assert json.loads((copy / PRIVATE).read_text())["preset"] == "msrope"
    narrow = random(replace(SHAPE, channels=8, out=8))
    with pytest.raises(ConfigError, match="16 channels a latent, the model reads 8"):
        write_diffusers(narrow, tmp_path / "narrow", preset="bil", codec=codec)


# ---- a run ----


@pytest.fixture
def _group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_group")
def test_a_run_is_exported_with_its_tokenizers(codec: LatentCodec, monkeypatch: Any, tmp_path: Path) -> None:
    """Train two steps on made-up latents, export, load: moving average, ids of words, and the sources that stock
    code reproduces."""
    told = TextCodec.fit(["a red ball on a blue table\n", "two green leaves\n"] * 30, size=300)
    tokens = TokenizerSet({"text": told, "latents": codec})
    tokens.save(tmp_path / "tokens")
    values = verify_dit.tiny_config(tmp_path, "run", world=1).to_dict()
    values["model"]["layers"] = 2
    values["tokenizers"] = {"dir": str(tmp_path / "tokens")}
    values["stages"] = [values["stages"][0] | {"tokens": 2 * 128 * 4}]
    plans = {"rgba": "text_to_layers", "video": "decomposition"}
    for source in values["data"]["sources"]:
        source["plan"] = list(TASKS[plans[source["name"]]])
    config = config_from_dict(values, source="test")
    folder = RunFolder(Path(config.run.dir))
    folder.acquire()
    Trainer(
        config, SyntheticLatents(vocab=tokens.manifest.size, channels=16), vocab=tokens.manifest.size,
        vocabulary=tokens.manifest, channels=16, folder=folder, rank=0, report=lambda line: None,
    ).run()  # fmt: skip
    folder.release()

    record = export_run(folder.path)
    out = Path(record["path"])
    assert out == folder.path / "export" and record["step"] == 2
    assert 0 <= record["max_rel_output_diff"] <= BOUND
    assert record["vocabulary"] == tokens.manifest.hash and record["stock_sources"] == ["video"]
    for average, same in ((True, True), (False, False)):
        trained = dict(load_run(folder.path, average=average)[0].named_parameters())
        back = dict(read_diffusers(out).named_parameters())
        assert all(torch.equal(back[name], value) for name, value in trained.items()) is same

    pipeline = LayerPipeline.load(out)
    prompt = "a red leaf, zwei Bälle"
    wanted = tokens.text_segment(prompt).ids.tolist()
    assert pipeline.ids(prompt).tolist() == [BOS, *wanted]
    assert pipeline.codec is not None and pipeline.codec.config == codec.config
    assert pipeline.words(prompt).shape == (len(wanted) + 1, 16)
    assert pipeline.flow == FlowSettings()
    loaded = (LWM(WORDS), *load_run(folder.path)[1:])
    monkeypatch.setattr(export_dit, "load_run", lambda *args, **kwargs: loaded)
    with pytest.raises(ConfigError, match="run of kind dit"):
        export_diffusion(folder.path)
