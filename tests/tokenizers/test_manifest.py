"""One hash over the vocabulary and every codec weight."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizer_samples import SMALL

from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.fit import fit_tokenizers
from ringweave.tokenizers.manifest import CONTROL, Block, VocabularyManifest
from ringweave.tokenizers.segment import MODALITY_ID
from ringweave.tokenizers.set import TokenizerSet


def test_layout(tokenizers: TokenizerSet) -> None:
    manifest = tokenizers.manifest
    assert [block.name for block in manifest.blocks] == [
        "text", "image", "rgba.alpha0", "rgba.alpha1", "rgba.colour", "audio.q0", "audio.q1", "audio.q2",
        "score.q0", "score.q1",
    ]  # fmt: skip
    assert all(block.start % 128 == 0 for block in manifest.blocks)
    assert manifest.blocks[0].start == 256
    assert manifest.size % 128 == 0
    assert manifest.size >= manifest.blocks[-1].stop
    assert manifest.block("image").size == SMALL.image_codes
    with pytest.raises(VocabularyError, match="no block 'nothing'"):
        manifest.block("nothing")


def test_control_ids_are_what_they_were() -> None:
    """These numbers are in every token cache and checkpoint: never change them."""
    first = ["pad", "bos", "eos", "eol", "eof", "eov", "layer", "blank", "boi", "eoi", "bor", "eor", "bov"]
    assert [CONTROL[name] for name in first] == list(range(13))
    assert [CONTROL[n] for n in ("boa", "eoa", "bos_score", "eos_score")] == [14, 15, 16, 17]


def test_modality_of(tokenizers: TokenizerSet) -> None:
    manifest = tokenizers.manifest
    ids = np.array([0, 255, 256, *(block.stop - 1 for block in manifest.blocks)], np.int32)
    wanted = [0, 0, MODALITY_ID["text"], *(MODALITY_ID[block.modality] for block in manifest.blocks)]
    found = manifest.modality_of(ids)
    assert found.dtype == np.int8
    assert found.tolist() == wanted
    for bad in (-1, manifest.size):
        with pytest.raises(VocabularyError):
            manifest.modality_of(np.array([bad], np.int32))


def test_json_round_trip_and_hash(tokenizers: TokenizerSet, tmp_path: Path) -> None:
    manifest = tokenizers.manifest
    again = VocabularyManifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.hash == manifest.hash
    path = tmp_path / "m.json"
    manifest.save(path)
    assert VocabularyManifest.load(path).hash == manifest.hash
    # Spelled differently, the same manifest.
    loose = json.dumps(json.loads(manifest.to_json()), indent=2)
    assert VocabularyManifest.from_json(loose).hash == manifest.hash


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"control": 3}', '{"version": 99}', "[" * 5000, '{"blocks": null}']
)
def test_malformed_manifests(text: str) -> None:
    with pytest.raises(VocabularyError):
        VocabularyManifest.from_json(text)


def test_bad_blocks() -> None:
    for blocks in (
        (Block("a", 100, 10, "text", "a", ""),),
        (Block("a", 300, 10, "text", "a", ""),),
        (Block("a", 256, 200, "text", "a", ""), Block("b", 384, 10, "text", "b", "")),
        (Block("a", 256, 10, "text", "a", ""), Block("a", 384, 10, "text", "a", "")),
        (Block("a", 256, 10, "smell", "a", ""),),
    ):
        with pytest.raises(VocabularyError):
            VocabularyManifest(blocks)
    with pytest.raises(VocabularyError, match="format 99"):
        VocabularyManifest((), version=99)


def test_save_and_load_keep_every_byte(tokenizers: TokenizerSet, folder: Path, tmp_path: Path) -> None:
    tokenizers.save(tmp_path / "copy")
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "copy").iterdir())
    assert all((tmp_path / "copy" / n).read_bytes() == (folder / n).read_bytes() for n in names)


@pytest.mark.parametrize("codec", ["image", "rgba", "audio", "score"])
def test_one_flipped_weight_fails_by_name(folder: Path, tmp_path: Path, codec: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / f"{codec}.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(VocabularyError, match=f"the {codec} codec is not the one"):
        TokenizerSet.load(copy)


@pytest.mark.parametrize("codec", ["image", "rgba", "audio", "score"])
def test_any_weight_changes_the_hash(tokenizers: TokenizerSet, codec: str) -> None:
    old = tokenizers.codecs[codec]
    for name, tensor in old.tensors.items():
        changed = tensor.copy()
        changed.flat[len(changed.flat) // 2] += 1
        fresh = type(old)(old.config, old.tensors | {name: changed})
        other = TokenizerSet(tokenizers.codecs | {codec: fresh})
        assert other.manifest.hash != tokenizers.manifest.hash, name


def test_missing_and_foreign_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match="cannot read the vocabulary manifest"):
        TokenizerSet.load(tmp_path / "nowhere")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "text.model").write_bytes(b"other")
    with pytest.raises(VocabularyError, match="sentencepiece"):
        TokenizerSet.load(copy)
    (copy / "text.model").unlink()
    with pytest.raises(VocabularyError, match="the text codec is missing"):
        TokenizerSet.load(copy)
    assert issubclass(VocabularyError, DataError)


def test_another_manifest_beside_the_codecs(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    raw = json.loads((copy / "tokenizers.json").read_text())
    raw["preprocessing"]["time_unit_ms"] = 20
    (copy / "tokenizers.json").write_text(json.dumps(raw))
    with pytest.raises(VocabularyError, match="does not describe"):
        TokenizerSet.load(copy)


def test_codec_files_of_the_wrong_kind(tokenizers: TokenizerSet) -> None:
    codecs = tokenizers.codecs
    with pytest.raises(VocabularyError, match="kind 'score'"):
        type(codecs["image"]).from_bytes(codecs["score"].to_bytes(), where="x")
    with pytest.raises(VocabularyError, match="not a readable"):
        type(codecs["image"]).from_bytes(b"\xff" * 40, where="x")


def test_fitting_twice_gives_the_same_hash(
    train_records: dict[str, list[dict[str, bytes]]], tokenizers: TokenizerSet, tmp_path: Path
) -> None:
    figures = fit_tokenizers(train_records, tmp_path, sizes=SMALL)
    assert figures["hash"] == tokenizers.manifest.hash
    assert figures["vocabulary"] == tokenizers.manifest.size


def test_damaged_records_are_passed_over_and_counted(
    train_records: dict[str, list[dict[str, bytes]]], tmp_path: Path
) -> None:
    score = [{"png": b"broken"}, {}, *train_records["score"]]
    figures = fit_tokenizers({"score": score}, tmp_path, sizes=SMALL)
    assert figures["skipped"] == {"score": 2}
    assert list(TokenizerSet.load(tmp_path).codecs) == ["score"]
    with pytest.raises(DataError, match="no records"):
        fit_tokenizers({"score": [{}]}, tmp_path, sizes=SMALL)
