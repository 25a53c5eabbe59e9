"""`layout.norms` where it is not given: by the kind of model, in the config that is checked, printed and stored."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from ringweave.pretrain.config import RunConfig, config_from_dict, load_config, resume_differences
from ringweave.pretrain.config_layouts import nearest_layouts
from ringweave.pretrain.errors import ConfigError

VALUES: dict[str, Any] = {
    "run": {"name": "x", "dir": "runs/x"}, "tokenizers": {"dir": "none"}, "optimizer": {"lr": 1e-3},
    "data": {"dir": "data", "sources": [{"name": "s", "shards": "s.tar", "plan": ["caption?", "latents:layers"]}]},
    "model": {"kind": "dit", "layers": 4, "width": 128, "heads": 4},
    "stages": [{"context": 256, "tokens": 8192, "batch": 4}],
}  # fmt: skip
LWM = {"model": {"layers": 4, "width": 128, "heads": 4}}


def config(*layouts: Any, **sections: Any) -> RunConfig:
    stages = [{**VALUES["stages"][0], **({} if layout is None else {"layout": layout})} for layout in layouts]
    return config_from_dict({**copy.deepcopy(VALUES), "stages": stages, **sections}, source="test")


def norms(found: RunConfig) -> list[str]:
    return [stage.layout.norms for stage in found.stages]


def test_a_dit_needs_no_key_under_tp() -> None:
    given = {"tp": 2}
    assert norms(config(given, {"tp": 2, "norms": "replicated"})) == ["replicated"] * 2
    assert given == {"tp": 2}, "the caller's values are not touched"
    assert norms(config(None)) == norms(config({"dp": 2})) == ["replicated"]
    plain = [{"name": "s", "shards": "s.tar", "plan": ["text"]}]
    assert norms(config({"tp": 2}, **LWM, data={"dir": "data", "sources": plain})) == ["sequence"]


def test_what_is_asked_for_stays() -> None:
    plain = [{"name": "s", "shards": "s.tar", "plan": ["text"]}]
    lwm = config({"tp": 2, "norms": "replicated"}, **LWM, data={"dir": "data", "sources": plain})
    assert norms(lwm) == ["replicated"]
    assert norms(config({"dp": 2, "norms": "sequence"})) == ["sequence"]
    with pytest.raises(ConfigError, match=r"norms: sequence with kind: dit and tp = 2") as caught:
        config({"tp": 2}, {"tp": 2, "norms": "sequence"})
    assert caught.value.problems[0].key == "stages.1.layout.norms"


def test_the_value_in_force_is_printed_and_stored(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(VALUES))
    found = load_config(file, ["stages.0.layout.tp=4"])
    assert yaml.safe_load(found.to_yaml())["stages"][0]["layout"]["norms"] == "replicated"
    assert config_from_dict(found.to_dict(), source="saved") == found
    # A checkpoint of an earlier version said sequence where it had no effect: its run goes on.
    before = config({"dp": 4, "norms": "sequence"})
    (difference,) = resume_differences(before.to_dict(), config({"dp": 4}))
    assert difference == ("stages.0.layout.norms", "sequence", "replicated", "harmless")
    # What is proposed in place of a layout that cannot work is legal too.
    for layout in nearest_layouts(found, 0, 8):
        assert norms(config(layout.model_dump())) == ["replicated"]


@pytest.mark.parametrize("stages", [None, 7, [7], [None], [{"layout": None}], [{"layout": "tp"}]])
def test_other_forms_are_left_to_the_checks(stages: Any) -> None:
    with pytest.raises(ConfigError, match="stages"):
        config_from_dict({**VALUES, "stages": stages}, source="test")
