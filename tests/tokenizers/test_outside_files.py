"""What is read from outside, what is refused, and what the identity of a codec covers."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ringweave.tokenizers import outside_load
from ringweave.tokenizers.errors import VocabularyError
from ringweave.tokenizers.outside_files import build, exactly, library, read_weights

TENSORS = {"weight": torch.arange(12.0).reshape(3, 4), "bias": torch.ones(3), "steps": torch.tensor(7)}


def write(
    folder: Path, tensors: dict[str, torch.Tensor] = TENSORS, config: dict[str, Any] | None = None
) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"size": 3} if config is None else config))
    return folder


def test_flipping_one_bit_of_one_weight_changes_the_identity(tmp_path: Path) -> None:
    first = read_weights(write(tmp_path / "a")).identity("x", {})
    assert read_weights(write(tmp_path / "b")).identity("x", {}) == first
    weight = TENSORS["weight"].clone()
    weight.view(torch.int32)[1, 2] ^= 1
    others = [
        read_weights(write(tmp_path / "c", TENSORS | {"weight": weight})).identity("x", {}),
        read_weights(write(tmp_path / "d", TENSORS | {"weight": TENSORS["weight"].reshape(4, 3)})).identity(
            "x", {}
        ),
        read_weights(write(tmp_path / "e", config={"size": 4})).identity("x", {}),
        read_weights(tmp_path / "a").identity("y", {}),
        read_weights(tmp_path / "a").identity("x", {"pixels": "unit"}),
        read_weights(write(tmp_path / "f", {k: v.half() for k, v in TENSORS.items()})).identity("x", {}),
    ]
    assert len({first, *others}) == 7
    renamed = {("bias2" if k == "bias" else k): v for k, v in TENSORS.items()}
    assert read_weights(write(tmp_path / "g", renamed)).identity("x", {}) != first


def test_who_wrote_the_files_and_how_they_are_cut_does_not(tmp_path: Path) -> None:
    first = read_weights(write(tmp_path / "a"))
    written = {"size": 3, "_diffusers_version": "9", "transformers_version": "9", "torch_dtype": "float32"}
    again = read_weights(write(tmp_path / "b", config=written))
    cut = tmp_path / "c"
    cut.mkdir()
    names = {"weight": "m-1.safetensors", "bias": "m-2.safetensors", "steps": "m-2.safetensors"}
    for file in set(names.values()):
        save_file({k: v for k, v in TENSORS.items() if names[k] == file}, cut / file)
    (cut / "m.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (cut / "config.json").write_text('{"size": 3}')
    shards = read_weights(cut)
    single = read_weights(tmp_path / "a" / "model.safetensors")
    identities = {w.identity("x", {}) for w in (first, again, shards, single)}
    assert len(identities) == 1
    assert torch.equal(shards.tensors["weight"], TENSORS["weight"])


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "boom"))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "last.ckpt", "vqgan.pt", "params.pkl", "model.safetensors"]
)
def test_pickles_are_refused_unopened(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(VocabularyError) as caught:
            read_weights(path)
        if not name.endswith(".safetensors"):
            assert "save_file" in caught.value.fix
            assert name in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    def refused(match: str, path: Path = tmp_path) -> None:
        with pytest.raises(VocabularyError, match=match):
            read_weights(path)

    refused("no such file", tmp_path / "nowhere")
    refused("no .safetensors file in the folder")
    (tmp_path / "vae").mkdir()
    refused(str(tmp_path / "vae"))
    for name in ("a", "b"):
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    refused("several weight files.*a.safetensors, b.safetensors")
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-3])
    refused("not a readable safetensors file", tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text("[1]")
    refused("a JSON object was expected", tmp_path / "b.safetensors")
    (tmp_path / "config.json").write_text("{")
    refused("not readable JSON", tmp_path / "b.safetensors")
    (tmp_path / "config.json").write_text('{"size": NaN}')
    with pytest.raises(VocabularyError, match="no spelling"):
        read_weights(tmp_path / "b.safetensors").identity("x", {})
    index = tmp_path / "m.safetensors.index.json"
    for value, match in (
        ({"weight_map": {"x": "../b.safetensors"}}, "outside its folder"),
        ({"weight_map": {"x": "gone.safetensors"}}, "missing: gone"),
        ({"weight_map": {"x": "config.json"}}, "safetensors only"),
        ({"weight_map": ["x"]}, "no weight_map"),
    ):
        index.write_text(json.dumps(value))
        refused(match)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, number: float) -> None:
    bad = TENSORS | {"bias": torch.tensor([1.0, number, 2.0])}
    with pytest.raises(VocabularyError, match="bias holds numbers that are not finite"):
        read_weights(write(tmp_path / "a", bad))
    with pytest.raises(VocabularyError, match="float8"):
        read_weights(write(tmp_path / "b", {"w": torch.zeros(4).to(torch.float8_e4m3fn)}))


def test_misfits_are_named_and_nothing_is_allocated(tmp_path: Path) -> None:
    read = read_weights(write(tmp_path / "a", {"weight": torch.ones(3, 4), "bias": torch.ones(3)}))
    layer = build(lambda: torch.nn.Linear(4, 3), read.tensors, where="here", device="cpu")
    assert torch.equal(layer(torch.ones(1, 4)), torch.full((1, 3), 5.0))
    assert not layer.training
    with pytest.raises(VocabularyError) as caught:
        build(lambda: torch.nn.Linear(10**7, 10**7, bias=False), read.tensors, where="here", device="cpu")
    assert "not expected: bias; other shape: weight is [3, 4], not [10000000, 10000000]" in caught.value.why
    with pytest.raises(VocabularyError, match="does not describe a model"):
        build(lambda: torch.nn.Linear(-1, 3), read.tensors, where="here", device="cpu")


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(VocabularyError) as caught:
        library("diffusers", "VQModel", extra="outside")
    assert "ringweave[outside]" in caught.value.fix
    with pytest.raises(VocabularyError, match="NoSuchModel"):
        library("transformers", "NoSuchModel", extra="")


def test_one_door_picks_the_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in (outside_load.OutsideAudio, outside_load.OutsideImage, outside_load.OutsideLatents):
        monkeypatch.setattr(cls, "load", classmethod(lambda cls, path, **options: (cls.__name__, options)))
    for config, name in (
        ({"model_type": "mimi"}, "OutsideAudio"),
        ({"_class_name": "AutoencoderKLWan"}, "OutsideLatents"),
        ({"_class_name": "VQModel"}, "OutsideImage"),
        ({"ddconfig": {}}, "OutsideImage"),
    ):
        folder = write(tmp_path, config=config)
        assert outside_load.load_outside(folder, device="cpu") == (name, {"device": "cpu"})
        assert outside_load.load_outside(folder / "model.safetensors") == (name, {})
    assert outside_load.load_outside(tmp_path / "nowhere") == ("OutsideImage", {})


def test_exactly_is_one_thread_of_float32_and_gives_everything_back() -> None:
    """Latents of a VQGAN moved by 6e-7 from one thread to two and by 1e-6 from one picture to three."""
    seen: list[Any] = []

    def look() -> None:
        with exactly():
            seen.extend(
                (torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.is_grad_enabled())
            )
            seen.append((torch.ones(4, 4) @ torch.ones(4, 4)).dtype)
            raise KeyError

    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with pytest.raises(KeyError):
                look()
            assert torch.is_autocast_enabled("cpu")
        assert seen == [1, "highest", False, torch.float32]
        assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (2, "medium")
        assert torch.is_grad_enabled()
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
