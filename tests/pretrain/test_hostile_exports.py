"""ringweave.json and config.json of exports with damaged and hostile values: errors that name the key."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ringweave.pretrain.flow import FlowSettings
from ringweave.pretrain.import_dit import PRIVATE, read_diffusers
from ringweave.pretrain.layer_pipeline import LayerPipeline
from ringweave.pretrain.models.dit_positions import Grid
from ringweave.pretrain.private_fields import flow_of
from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.latent_codec import LatentCodec
from ringweave.tokenizers.outside_latents import OutsideLatents

# Test modules are imported one by one (import mode "importlib"), so shared helpers need a path of their own.
sys.path.append(str(Path(__file__).parent))

DEEP: Any = []
for _ in range(300):
    DEEP = [DEEP, {"a": DEEP}] if len(str(DEEP)) < 200 else [DEEP]
#: What stands in the place of a value. Python's JSON reads NaN, Infinity and numbers of any length.
JUNK: dict[str, Any] = {
    "null": None, "true": True, "text": "7", "nan": float("nan"), "infinity": float("inf"), "minus": -1, "zero": 0,
    "half": 0.5, "huge": 10**30, "long": 10**400, "list": [1, 2], "nested": DEEP, "object": {"mean": 1},
}  # fmt: skip
#: Keys, and the junk that is a sound value of each.
SOUND: dict[str, tuple[str, ...]] = {
    "format": (), "preset": (), "sign": ("minus",), "head": ("true",), "zero_init": ("true",), "axes": (),
    "words.layers": (), "words.width": (), "words.heads": (), "words.kv_heads": (), "words.ffn": (),
    "words.vocab": (), "words.norm_eps": ("half",), "words.head_chunk": (), "words.window": ("null",),
    "words.full_every": (), "latents.channels": (), "latents.out": (), "latents.patch": (), "latents.mean": (),
    "latents.std": (), "flow.sampler": (), "flow.shift": (), "flow.weighting": (),
    "flow.mean": ("minus", "zero", "half"), "flow.std": ("half",), "flow.scale": ("minus", "zero", "half"),
    "flow.shift_base": (), "flow.shift_from": ("list",), "flow.shift_to": ("list",), "prompts.begin_with": (),
    "flow": (), "prompts": (), "latents": (), "words": (),
}  # fmt: skip
#: What the pipeline compares with the VAE.
OF_VAE = ("latents.patch", "latents.mean", "latents.std")
#: What both compare with the weights.
COMPARED = ("axes", "latents", "latents.channels", "latents.out")
#: Errors that say it in other words.
NOT_NAMED = {
    "words": "no sizes of it", "words.layers": "not expected", "format": "not of format 1", "preset": "numbered",
    "sign": "numbered",
}  # fmt: skip


@pytest.fixture(scope="module")
def hostile(layered: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, Any], Path]]:
    """A copy of an export with one key of ringweave.json set; the one before is as it was again."""
    folder = Path(shutil.copytree(layered, tmp_path_factory.mktemp("hostile") / "out"))
    before = (folder / PRIVATE).read_text()

    def changed(key: str, value: Any) -> Path:
        about = json.loads(before)
        *parts, last = key.split(".")
        place = about
        for part in parts:
            place = place[part]
        assert last in place or value is not None
        place[last] = value
        (folder / PRIVATE).write_text(json.dumps(about))
        return folder

    yield changed
    (folder / PRIVATE).write_text(before)


@pytest.mark.parametrize("key", SOUND)
def test_junk_is_named_by_its_key(hostile: Callable[[str, Any], Path], key: str) -> None:
    for name, value in JUNK.items():
        folder = hostile(key, value)
        for read in (LayerPipeline.load, read_diffusers):
            if name in SOUND[key]:
                read(folder)
                continue
            if read is read_diffusers and (key in OF_VAE or (key, name) == ("latents", "object")):
                continue  # it reads no VAE
            if read is read_diffusers and key in COMPARED and name not in ("null", "huge", "nested"):
                continue  # by the same function, after the weights
            with pytest.raises(VocabularyError) as caught:
                read(folder)
            said = str(caught.value)
            assert key in said or NOT_NAMED.get(key, "?") in said, (name, said)
            assert str(folder) in said, (name, said)
            assert len(said) < 800, (name, said)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("flow.hue", 1, "does not know the setting flow.hue"),
        ("words.rank", 1, "words.rank is not known"),
        ("colour", {"a": [1]}, "does not know the key 'colour'"),
        ("flow.shift", "square", "(?s)flow.shift is 'square'.*none, exponential, linear"),
        ("flow.shift_from", [256, 1e300], "flow.shift_from is .256, 1e.300"),
        ("flow.shift_to", [256, 0.9], "another number of tokens than in shift_from"),
        ("flow.shift_to", ["256", 0.9], "flow.shift_to"),
        ("words.heads", 8, "no even whole heads"),
        ("words.vocab", 1, "words.vocab is 1, not a whole number from 3"),
        ("axes", [12, 8, 12], "as transformer/config.json has it"),
        ("latents.channels", 32, "latents.channels is 32"),
        ("latents.std", [0.5, 2.0, 0.3, 1.1], "(?s)latents.std is .0.5, 2.0, 0.3, 1.1.*vae/config.json"),
    ],
)
def test_what_does_not_fit_is_named(
    hostile: Callable[[str, Any], Path], key: str, value: Any, said: str
) -> None:
    with pytest.raises(VocabularyError, match=said):
        LayerPipeline.load(hostile(key, value))


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("transformer", {"num_attention_heads": "4"}, "num_attention_heads is '4'"),
        ("transformer", {"in_channels": 10**400}, "in_channels is 1000"),
        ("transformer", {"in_channels": float("nan")}, "in_channels is nan"),
        ("transformer", {"out_channels": 0}, "out_channels is 0"),
        ("transformer", {"out_channels": {}}, "out_channels is {}"),
        ("transformer", {"axes_dims_rope": [[8], 12, 12]}, "axes_dims_rope"),
        ("transformer", {"num_attention_heads": 1 << 24, "attention_head_dim": 1 << 24,
                         "axes_dims_rope": [1 << 23, 1 << 22, 1 << 22]}, "not describe a model"),
        ("vae", {"latents_std": [10**400, 1, 1, 1]}, "the latent statistics do not fit"),
        ("vae", {"latents_mean": [1e300, 1, 1, 1]}, "the latent statistics do not fit"),
        ("vae", {"latents_mean": 4}, "latents_mean must be a list"),
        ("vae", {"latents_std": [1.0, "x", 1.0, 1.0]}, "the latent statistics do not fit"),
    ],
)  # fmt: skip
def test_configs_of_the_parts(copy: Path, part: str, changes: dict[str, Any], said: str) -> None:
    path = copy / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(VocabularyError, match=said):
        LayerPipeline.load(copy)
    with pytest.raises(VocabularyError, match=said):
        read_diffusers(copy) if part == "transformer" else LatentCodec.from_diffusers(copy / part)
    if part == "vae":
        with pytest.raises(VocabularyError, match="latent statistics"):
            OutsideLatents.load(copy / part)


def test_a_shift_beyond_all_numbers_is_told_when_it_is_used(hostile: Callable[[str, Any], Path]) -> None:
    """Each end is sound; the line through them is not, far outside."""
    from ringweave.pretrain.dit_sample import Wish

    folder = hostile("flow.shift_from", [1, -100.0])
    flow = json.loads((folder / PRIVATE).read_text())["flow"] | {"shift_to": [2, 100.0]}
    pipeline = LayerPipeline.load(hostile("flow", flow))
    assert isinstance(flow_of({"flow": flow}, where="x"), FlowSettings)
    with pytest.raises(DataError, match=r"flow\.shift_from"):
        pipeline.sample(Wish("a", [3], [Grid(4, 4)]))
