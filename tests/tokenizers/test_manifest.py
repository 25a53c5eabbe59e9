"""One hash over the vocabulary and every codec weight."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizer_samples import SMALL

from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.fit import fit_tokenizers
from ringweave.tokenizers.manifest import (
    CONTROL,
    Block,
    VocabularyManifest,
    apply_remap,
    remap,
    require_same,
)
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
    later = ("bos_symbolic", "eos_symbolic", "bos_midi", "eos_midi", "latent")
    assert [CONTROL[n] for n in later] == [18, 19, 20, 21, 22]


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


A, B, C, D = (letter * 64 for letter in "abcd")
TEXT, IMAGE = ("text", 1000, "text", "text", A), ("image", 8192, "image", "image", B)
AUDIO = [(f"audio.q{q}", 256, "audio", "audio", C) for q in range(2)]
PREPROCESSING = {"time_unit_ms": 40, "audio": {"rate": 16000, "hop": 640}}


def build(*parts: tuple[str, int, str, str, str], **changed: Any) -> VocabularyManifest:
    """A manifest of these parts, else of text, image and two books of audio."""
    fields = {"text_pieces": A, "preprocessing": PREPROCESSING} | changed
    return VocabularyManifest.build(list(parts) or [TEXT, IMAGE, *AUDIO], **fields)


def test_saved_manifests_keep_their_hash() -> None:
    """Made by the first version of the format; this number is in token caches and checkpoints."""
    first = {name: number for name, number in CONTROL.items() if number < 18}
    assert build(control=first).hash == "10a545a7d9f644932f6bdad261a672e14241bcd7949bf0fdbc8c452ab0507a7e"


def test_a_manifest_with_fewer_control_ids_keeps_its_hash() -> None:
    """A version that names a reserved number must still read what was saved before it."""
    raw = json.loads(build().to_json())
    del raw["control"]["eos_score"]
    older = VocabularyManifest.from_json(json.dumps(raw))
    assert "eos_score" not in json.loads(older.to_json())["control"]
    assert older.hash == VocabularyManifest.from_json(older.to_json()).hash != build().hash
    assert build().extends(older) and not older.extends(build())
    assert older.append([("score", 9, "score", "score", D)]).control == older.control
    difference = older.difference(build(), mine="A", theirs="B")
    assert difference == "control.eos_score: absent in A, 17 in B"
    assert remap(build(), older)[[16, 17, 18]].tolist() == [16, -1, 18]


@pytest.mark.parametrize(("name", "number"), [("eol", 7), ("bos_smell", 18)])
def test_other_control_ids_are_named(name: str, number: int) -> None:
    raw = json.loads(build().to_json())
    raw["control"][name] = number
    with pytest.raises(VocabularyError, match=f"'{name}' is {number} there") as caught:
        VocabularyManifest.from_json(json.dumps(raw), where="some/tokenizers.json")
    assert caught.value.where == "some/tokenizers.json"


CHANGES: list[tuple[VocabularyManifest, str]] = [
    (build(TEXT, ("image", 4096, "image", "image", B), *AUDIO), "block 'image': size 8192 in A, 4096 in B"),
    (build(TEXT, IMAGE[:4] + (D,), *AUDIO), f"block 'image': weights {B[:12]}… in A, {D[:12]}… in B"),
    (build(("text", 1200, *TEXT[2:]), IMAGE, *AUDIO), "block 'text': size 1000 in A, 1200 in B"),
    (build(TEXT, IMAGE), "block 'audio.q0' is only in A"),
    (build(TEXT, IMAGE, *AUDIO, ("sym", 9, "score", "s", D)), "block 'sym' is only in B"),
    (build(TEXT, *AUDIO, IMAGE), "block 'image': name image in A, audio.q0 in B"),
    (build(text_pieces=D), f'text_pieces: "{A[:59]} in A, "{D[:59]} in B'),
    (
        build(preprocessing={"time_unit_ms": 40, "audio": {"rate": 24000, "hop": 640}}),
        "preprocessing.audio.rate: 16000 in A, 24000 in B",
    ),
    (build(preprocessing={"audio": PREPROCESSING["audio"]}), "preprocessing.time_unit_ms: 40 in A, absent in B"),
    (build(preprocessing=PREPROCESSING | {"time_unit_ms": 40.0}), "preprocessing.time_unit_ms: 40 in A, 40.0 in B"),
    (
        replace(build(), blocks=(*build().blocks[:3], replace(build().blocks[3], start=9984))),
        "block 'audio.q1': starts at 9728 in A, 9984 in B",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("other", "said"), CHANGES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_first_difference_is_named(other: VocabularyManifest, said: str) -> None:
    assert build().difference(other, mine="A", theirs="B") == said
    assert other.hash != build().hash
    assert build().difference(build()) is None
    with pytest.raises(
        VocabularyError, match="the checkpoint was made with another vocabulary than here"
    ) as caught:
        require_same(build(), other, mine_is="here", theirs_is="the checkpoint")
    for part in (build().hash[:12], other.hash[:12], said.split(":")[0].split(" is ")[0]):
        assert part in caught.value.why
    assert caught.value.fix


def test_require_same_with_hashes_only() -> None:
    require_same(build(), build().hash, mine_is="here", theirs_is="there")
    require_same(build(), build(), mine_is="here", theirs_is="there")
    with pytest.raises(VocabularyError) as caught:
        require_same(build().hash, D, mine_is="here", theirs_is="there", fix="do this")
    assert caught.value.why == f"here: {build().hash[:12]}…; there: {D[:12]}…"
    assert caught.value.fix == "do this"


def test_a_vocabulary_that_only_adds_says_so() -> None:
    newer = build().append([("sym", 9, "score", "sym", D)])
    with pytest.raises(VocabularyError) as caught:
        require_same(newer, build(), mine_is="here", theirs_is="there")
    assert "only adds" in caught.value.fix


def test_append_changes_no_id() -> None:
    older = build()
    newer = older.append(
        [("sym.a", 100, "score", "sym", D), ("sym.b", 9, "score", "sym", D)], preprocessing={"sym": 1}
    )
    assert newer.blocks[:4] == older.blocks
    assert [(b.name, b.start) for b in newer.blocks[4:]] == [
        ("sym.a", older.size),
        ("sym.b", older.size + 128),
    ]
    assert newer.preprocessing == older.preprocessing | {"sym": 1}
    assert newer.extends(older) and not older.extends(newer) and older.extends(older)
    assert VocabularyManifest.from_json(newer.to_json()) == newer
    table = remap(older, newer)
    used = older._modality_table > 0
    assert (table[used] == np.flatnonzero(used)).all()
    without_text = build(IMAGE, text_pieces="")
    assert without_text.append([TEXT], text_pieces=A).text_pieces == A


@pytest.mark.parametrize(
    ("parts", "more"),
    [
        ([("sym", 9, "score", "sym", D)], {"preprocessing": {"time_unit_ms": 20}}),
        ([("text2", 9, "text", "text2", D)], {"text_pieces": D}),
        ([("image", 9, "image", "image", D)], {}),
    ],
)
def test_append_refuses_to_change(parts: list[Any], more: dict[str, Any]) -> None:
    with pytest.raises(VocabularyError):
        build().append(parts, **more)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: replace(m, blocks=m.blocks[:-1]),
        lambda m: replace(m, blocks=(replace(m.blocks[0], sha256=D), *m.blocks[1:])),
        lambda m: replace(m, preprocessing={"time_unit_ms": 40}),
        lambda m: replace(m, text_pieces=D),
    ],
)
def test_what_does_not_extend(change: Callable[[VocabularyManifest], VocabularyManifest]) -> None:
    assert not change(build()).extends(build())


def test_remap_follows_weights_not_names_or_places() -> None:
    older = build()
    newer = build(
        ("image", 8192, "image", "image", D),  # other weights
        ("sound.q0", 256, "audio", "sound", C),  # the same codec under another name
        ("sound.q1", 256, "audio", "sound", C),
        TEXT,
    )
    table = remap(older, newer)
    assert table.dtype == np.int32 and table.shape == (older.size,)
    assert table[:256].tolist() == list(range(256))
    for name, there in (("text", "text"), ("audio.q0", "sound.q0"), ("audio.q1", "sound.q1")):
        old, new = older.block(name), newer.block(there)
        assert table[old.start : old.stop].tolist() == list(range(new.start, new.stop))
    image = older.block("image")
    assert (table[image.start : image.stop] == -1).all()
    assert (table[older.block("text").stop : image.start] == -1).all()  # between two blocks
    assert sorted(table[table >= 256].tolist()) == sorted(set(table[table >= 256].tolist()))


def test_apply_remap_and_what_it_cannot_carry() -> None:
    older, newer = build(), build(("image", 8192, "image", "image", D), *AUDIO, TEXT)
    table = remap(older, newer)
    text, image, audio = (older.block(name).start for name in ("text", "image", "audio.q1"))
    ids = np.array([1, text, text + 999, audio + 3, 2], np.int32)
    found = apply_remap(ids, table, older=older)
    start = newer.block("text").start
    assert found.dtype == np.int32
    assert found.tolist() == [1, start, start + 999, newer.block("audio.q1").start + 3, 2]
    assert apply_remap(ids[:0], table, older=older).shape == (0,)
    for ids, said in (
        ([1, image + 5, 2, image], "it belongs to block 'image'; 2 of 4 ids have none"),
        ([text + 1000], "it belongs to no block"),
        ([-1], "it belongs to no block"),
        ([older.size], "it belongs to no block"),
    ):
        with pytest.raises(VocabularyError, match="has no counterpart") as caught:
            apply_remap(np.array(ids), table, older=older)
        assert caught.value.why.startswith(said)


def test_remap_of_a_block_of_another_size() -> None:
    """A codec whose file is the same but whose block is not has no counterpart."""
    newer = build(TEXT, ("image", 4096, "image", "image", B), *AUDIO)
    table = remap(build(), newer)
    image = build().block("image")
    assert (table[image.start : image.stop] == -1).all() and (table[: image.start] >= -1).all()


def test_remap_there_and_back() -> None:
    """For what both have, the two tables are inverse."""
    one, two = build(), build(AUDIO[0], AUDIO[1], ("sym", 5, "score", "sym", D), IMAGE)
    there, back = remap(one, two), remap(two, one)
    both = np.flatnonzero(there >= 0)
    assert (back[there[both]] == both).all()
    assert len(both) == 256 + 8192 + 512
