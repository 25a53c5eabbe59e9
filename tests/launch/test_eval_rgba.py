"""`ringweave eval rgba`: folders of pictures and of layers, what people and programs see, and hostile folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ringweave.launch.cli import run
from ringweave.launch.eval_rgba import find_pairs, read_stack
from ringweave.pretrain.rgba_matching import decomposition
from ringweave.pretrain.rgba_metrics import matting
from ringweave.pretrain.rgba_pictures import composite_consistency, flatten, reconstruction
from ringweave.tokenizers.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def write(path: Path, pixels: np.ndarray, form: str = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, form)


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, dict, str]:
    """(exit code, the JSON object, what people see)."""
    capsys.readouterr()
    code = run(["eval", "rgba", *map(str, argv), "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out.splitlines()[-1]), captured.err


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders with the RGBA pictures a.png and b.PNG, of two sizes."""
    for seed, folder in enumerate(("made", "true")):
        write(tmp_path / folder / "a.png", noise(seed, 14, 12, 4))
        write(tmp_path / folder / "b.PNG", noise(seed + 9, 3, 5, 4))
    return tmp_path / "made", tmp_path / "true"


@pytest.fixture
def layered(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of the samples one (2 and 3 layers, with trimap and composite) and two (1 and 1)."""
    made, true = tmp_path / "made", tmp_path / "true"
    for folder, depth in ((made, 2), (true, 3)):
        for number in range(depth):
            write(folder / "one" / f"layer{number}.png", noise(depth + number, 12, 13, 4))
        write(folder / "two" / "layer0.png", noise(depth, 1, 1, 4))
    trimap = np.zeros((12, 13), np.uint8)
    trimap[3:8, 2:9] = 128
    write(true / "one" / "trimap.png", trimap)
    write(true / "two" / "trimap.png", np.full((1, 1), 128, np.uint8))
    write(true / "one" / "composite.png", noise(7, 12, 13, 3))
    return made, true


# --- figures -----------------------------------------------------------------------------------------------


def test_pictures(pictures: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, facts, said = call(capsys, *pictures)
    assert (code, facts["kind"], facts["samples"], facts["ignored"]) == (0, "pictures", 2, 0)
    assert facts["composite"] is None and facts["region"] == facts["matting"]["region"] == "whole"
    made, true = ([np.asarray(Image.open(f / n)) for n in ("a.png", "b.PNG")] for f in pictures)
    alphas = [matting(m[..., 3], t[..., 3]) for m, t in zip(made, true)]
    for key in ("sad", "mse", "grad", "conn"):
        assert facts["matting"][key] == pytest.approx(np.mean([one[key] for one in alphas]))
    looks = [reconstruction([m], [t]) for m, t in zip(made, true)]
    assert facts["reconstruction"]["psnr"] == pytest.approx(np.mean([one["psnr"] for one in looks]))
    for name, figures in facts["reconstruction"]["backgrounds"].items():
        assert figures["ssim"] == pytest.approx(np.mean([one["backgrounds"][name]["ssim"] for one in looks]))
    assert [row["name"] for row in facts["per_sample"]] == ["a.png", "b.PNG"]
    assert facts["per_sample"][0]["matting"] == alphas[0] and facts["per_sample"][1]["layers"] == [1, 1]
    for wanted in ("whole region", "SAD / 1000", "magenta", "mean of nine", "alpha soft IoU", "b.PNG"):
        assert wanted in said


def test_layers(layered: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    made, true = layered
    (made / "one" / "composite.png").write_bytes(b"not looked at")
    (true / "one" / "notes.txt").write_text("either")
    code, facts, said = call(capsys, made, true, "--region", "unknown", "--merges", 2)
    assert (code, facts["kind"], facts["samples"], facts["ignored"]) == (0, "layers", 2, 1)
    stacks = [
        [np.asarray(Image.open(f / "one" / f"layer{i}.png")) for i in range(n)]
        for f, n in ((made, 2), (true, 3))
    ]
    one = next(row for row in facts["per_sample"] if row["name"] == "one")
    trimap = np.asarray(Image.open(true / "one" / "trimap.png"))
    # The top layers, in the region alone.
    wanted = matting(stacks[0][-1][..., 3], stacks[1][-1][..., 3], region="unknown", trimap=trimap)
    assert one["matting"] == wanted and wanted["pixels"] == 35 and one["layers"] == [2, 3]
    assert one["reconstruction"]["psnr"] == pytest.approx(reconstruction(*stacks)["psnr"])
    assert one["decomposition"] == decomposition(*stacks, merges=2)
    assert [row["allowed"] for row in facts["decomposition"]] == [0, 1, 2]
    picture = np.asarray(Image.open(true / "one" / "composite.png"))
    assert one["composite"] == pytest.approx(composite_consistency(stacks[0], picture))
    assert facts["composite"]["samples"] == 1 and facts["composite"]["l1"] == one["composite"]["l1"]
    assert (
        "unknown region" in said and "1 of 2 samples have a composite.png" in said and "1 other files" in said
    )


def test_a_perfect_copy_is_perfect(layered: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, true = layered
    layers = [np.asarray(Image.open(true / "one" / f"layer{i}.png")) for i in range(3)]
    colour, through = flatten(layers)
    alpha = np.maximum(1 - through, 1e-9)[..., None]
    rgba = np.concatenate([np.clip(np.rint(colour / alpha), 0, 255), np.rint(alpha * 255)], axis=2)
    write(true / "one" / "composite.png", rgba.astype(np.uint8))
    code, facts, _ = call(capsys, true, true)
    assert code == 0
    assert [facts["matting"][key] for key in ("sad", "mse", "grad", "conn")] == [0, 0, 0, 0]
    assert (facts["reconstruction"]["psnr"], facts["psnr_cap"], facts["reconstruction"]["ssim"]) == (
        100,
        100,
        1,
    )
    assert [row["cost"] for row in facts["decomposition"]] == [0] * 6
    assert facts["composite"]["l1"] < 0.004 and facts["composite"]["alpha_l1"] < 0.002, (
        "8 bits of straight alpha"
    )


def test_people_get_tables_without_json(
    pictures: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["eval", "rgba", *map(str, pictures)]) == 0
    out = capsys.readouterr().out
    assert "Looks over backgrounds" in out and "{" not in out


def test_a_hundred_layers_are_fast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for folder in ("made", "true"):
        for number in range(100):
            pixels = np.zeros((48, 48, 4), np.uint8)
            y, x = rng.integers(0, 30, 2)
            pixels[y : y + 18, x : x + 18] = (*rng.integers(0, 256, 3), 255)
            write(tmp_path / folder / "s" / f"layer{number}.png", pixels)
    began = time.process_time()
    code, facts, _ = call(capsys, tmp_path / "made", tmp_path / "true")
    assert code == 0 and facts["per_sample"][0]["layers"] == [100, 100]
    assert time.process_time() - began < 20


# --- the name of the command -------------------------------------------------------------------------------


def test_both_commands_have_their_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "rgba", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "Example: ringweave eval rgba" in out and "--json" in out and "ringweave eval rgba [OPTIONS]" in out
    )
    assert "./rgba" in out
    assert run(["eval", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Example: ringweave eval runs/demo" in out and "ringweave eval rgba" in out and "./rgba" in out
    assert run(["--help"]) == 0
    assert "eval rgba" in capsys.readouterr().out


def test_a_run_folder_called_rgba_is_reachable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`eval RUN` is what it was: the folder rgba is a run only as ./rgba, or where the words end with --."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rgba").mkdir()
    (tmp_path / "rgba" / "config.yaml").write_text("run: {}\n")
    evaluated = []
    stand_in = SimpleNamespace(evaluate_run=lambda path: evaluated.append(path) or {"heldout": {}, "step": 3})
    monkeypatch.setitem(sys.modules, "ringweave.pretrain.evaluate", stand_in)
    for argv in (["./rgba"], ["--json", "./rgba"], ["./rgba", "--json"], ["--", "rgba"]):
        capsys.readouterr()
        assert run(["eval", *argv]) == 0
        out = capsys.readouterr().out
        assert "--json" not in argv or json.loads(out.splitlines()[-1]) == {"heldout": {}, "step": 3}
    assert [path.name for path in evaluated] == ["rgba"] * 4
    assert run(["eval", "rgba"]) == 2
    assert "`ringweave eval rgba --help`" in capsys.readouterr().err
    assert run(["eval", "other", "rgba"]) == 2
    assert "`ringweave eval --help`" in capsys.readouterr().err
    assert run(["eval", "no-run"]) == 2
    assert "no such run folder" in capsys.readouterr().err
    assert run(["eval"]) == 2
    assert "RUN" in capsys.readouterr().err
    assert len(evaluated) == 4


def test_options_may_stand_anywhere(pictures: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    made, true = map(str, pictures)
    said = []
    for argv in (
        ["--json", "rgba", made, true],
        ["rgba", "--json", made, true],
        ["rgba", made, "--json", true],
    ):
        capsys.readouterr()
        assert run(["eval", *argv]) == 0
        said.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert said[0] == said[1] == said[2]


def test_torch_is_not_imported(pictures: tuple[Path, Path]) -> None:
    program = (
        "import sys; from ringweave.launch.cli import run; code = run(sys.argv[1:])\n"
        "print(code, *(m for m in ('torch', 'transformers', 'scipy', 'skimage') if m in sys.modules))"
    )
    argv = [sys.executable, "-c", program, "eval", "rgba", *map(str, pictures)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "0"


# --- bad input ---------------------------------------------------------------------------------------------


def fails(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 3) -> str:
    """The message; the exit code and JSON are checked."""
    got, facts, said = call(capsys, *argv)
    assert (got, facts["exit_code"]) == (code, code), said
    assert "Traceback" not in said and facts["what"] in said
    return said


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P"])
def test_no_alpha_is_not_opaque(
    mode: str, pictures: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    made, true = pictures
    for folder in (made, true):
        kept = (folder / "a.png").read_bytes()
        Image.open(folder / "a.png").convert("RGB").convert(mode).save(folder / "a.png")
        said = fails(capsys, made, true)
        assert "no alpha channel" in said and str(folder / "a.png") in said
        (folder / "a.png").write_bytes(kept)


def test_missing_partners_are_named(pictures: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    made, true = pictures
    (made / "a.png").unlink()
    said = fails(capsys, made, true)
    assert "1 of 2 samples have no partner" in said and f"where: {made}" in said and "no a.png" in said
    said = fails(capsys, true, made)
    assert f"where: {made}" in said and "no a.png" in said
    for number in range(9):
        write(true / f"more{number}.png", noise(1, 2, 2, 4))
    assert "more0.png, more1.png, more2.png, more3.png and 5 more" in fails(capsys, made, true)


def test_other_sizes_are_named(layered: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    made, true = layered
    small = noise(1, 12, 11, 4)
    for path, pixels in (
        (true / "one" / "layer2.png", small),
        (made / "one" / "layer1.png", small),
        (true / "one" / "trimap.png", np.full((12, 11), 128, np.uint8)),
        (true / "one" / "composite.png", small[..., :3]),
    ):
        kept = path.read_bytes()
        write(path, pixels)
        said = fails(capsys, made, true, "--region", "unknown")
        assert "differ in size" in said and str(path) in said and "11x12" in said and "13x12" in said
        path.write_bytes(kept)
    write(made / "two" / "layer0.png", noise(1, 1, 2, 4))
    assert "2x1" in fails(capsys, made, true)


def test_layers_have_to_be_numbered_without_gaps(
    layered: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    made, true = layered
    (true / "one" / "layer1.png").rename(true / "one" / "layer3.png")
    assert "layer1.png is missing" in fails(capsys, made, true)
    (true / "one" / "layer3.png").rename(true / "one" / "layer01.png")
    assert "has no number" in fails(capsys, made, true)
    (true / "one" / "layer01.png").unlink()
    (true / "one" / "layer2.png").unlink()
    (true / "one" / "layer0.png").unlink()
    assert "layer0.png is missing" in fails(capsys, made, true)


def test_trimaps_that_do_not_do(layered: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    made, true = layered
    path = true / "two" / "trimap.png"
    for pixels, why in (
        (np.full((1, 1), 127, np.uint8), "no unknown pixel"),
        (np.uint8([[[128, 128, 0]]]), "coloured"),
        (np.uint8([[[128, 128, 128, 254]]]), "transparent"),
    ):
        write(path, pixels)
        said = fails(capsys, made, true, "--region", "unknown")
        assert why in said and str(path) in said
        assert call(capsys, made, true)[0] == 0, "it is not needed for the whole region"
    write(path, np.uint8([[[128, 128, 128, 255]]]))
    assert call(capsys, made, true, "--region", "unknown")[0] == 0
    path.unlink()
    assert "needs a trimap" in fails(capsys, made, true, "--region", "unknown")


def test_pictures_have_no_trimap(pictures: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert "needs a trimap" in fails(capsys, *pictures, "--region", "unknown")


def test_folders_that_hold_nothing_or_both(
    tmp_path: Path, pictures: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    made, true = pictures
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".hidden.png").write_bytes(b"")
    assert "nothing to compare" in fails(capsys, tmp_path / "empty", true)
    assert "nothing to compare" in fails(capsys, made, tmp_path / "empty")
    write(tmp_path / "stacks" / "a.png" / "layer0.png", noise(1, 2, 2, 4))
    assert "not alike" in fails(capsys, tmp_path / "stacks", true)
    write(tmp_path / "stacks" / "b.png", noise(1, 2, 2, 4))
    assert "pictures and samples of layers" in fails(capsys, tmp_path / "stacks", true)
    (made / "readme.txt").write_text("x")
    assert call(capsys, made, true)[1]["ignored"] == 1


def test_arguments_that_make_no_sense(
    pictures: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    made, true = pictures
    assert "name whole or unknown" in fails(capsys, made, true, "--region", "hole", code=2)
    assert "no such folder of predictions" in fails(capsys, made / "no", true, code=2)
    assert "no such reference folder" in fails(capsys, made, true / "a.png", code=2)
    for merges in ("-1", "101", "x"):
        assert run(["eval", "rgba", str(made), str(true), "--merges", merges]) == 2


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no PNG"),
        (b"RIFF....WEBP", "no PNG"),
        (b"\xff\xd8\xff\xe0", "no PNG"),
        (b"\x89PNG\r\n\x1a\n", "cannot decode"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 99, "cannot decode"),
    ],
)
def test_files_that_are_no_png(
    data: bytes, why: str, pictures: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    made, true = pictures
    (made / "a.png").write_bytes(data)
    said = fails(capsys, made, true)
    assert why in said and str(made / "a.png") in said


def test_a_cut_file_and_a_pipe(pictures: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    made, true = pictures
    whole = (made / "a.png").read_bytes()
    (made / "a.png").write_bytes(whole[:-20])
    assert str(made / "a.png") in fails(capsys, made, true)
    (made / "a.png").unlink()
    os.mkfifo(made / "a.png")  # reading it would wait for ever
    assert "no a.png" in fails(capsys, made, true)
    with pytest.raises(DataError, match="not a file"):
        read_stack([made / "a.png"])


def test_names_that_a_terminal_obeys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b[31m\u202e[bold]\n.png"
    broken = os.fsdecode(b"\xff.png")
    for folder in ("made", "true"):
        for name in (evil, broken):
            write(tmp_path / folder / name, noise(1, 2, 2, 4))
    code, facts, said = call(capsys, tmp_path / "made", tmp_path / "true")
    assert code == 0 and facts["samples"] == 2
    assert "\x1b" not in said and "\u202e" not in said and "[bold]\ufffd.png" in said
    (tmp_path / "made" / evil).unlink()
    (tmp_path / "made" / broken).unlink()
    write(tmp_path / "made" / "x.png", noise(1, 2, 2, 4))
    said = fails(capsys, tmp_path / "made", tmp_path / "true")
    assert "\x1b" not in said and "\u202e" not in said and "[bold]\ufffd.png" in said
    write(tmp_path / "true" / "x.png", noise(1, 2, 2, 3))
    (tmp_path / "true" / broken).unlink()
    write(tmp_path / "made" / evil, noise(1, 2, 2, 3))
    assert "\x1b" not in fails(capsys, tmp_path / "made", tmp_path / "true")


def test_pairs_are_in_order_of_their_names(layered: tuple[Path, Path]) -> None:
    found = find_pairs(*layered)
    assert [pair.name for pair in found.pairs] == ["one", "two"]
    assert [path.name for path in found.pairs[0].reference] == ["layer0.png", "layer1.png", "layer2.png"]
    for number in range(3, 12):  # by number, not by letter
        write(layered[1] / "one" / f"layer{number}.png", noise(1, 12, 13, 4))
    names = [path.name for path in find_pairs(*layered).pairs[0].reference]
    assert names == [f"layer{number}.png" for number in range(12)]
