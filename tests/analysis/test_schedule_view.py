"""The schedule is shown as it will be run."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from ruamel.yaml import YAML
from torch import nn

from pipeline import config, nets
from pipeline.__main__ import main
from pipeline.analysis import schedule_view
from pipeline.training import schedule
from pipeline.training.schedule import Phase

ROOT = Path(__file__).parents[2]


def _planned(net: nn.Module, **changed: Any) -> list[Phase]:
    overrides = {f"train.{key}": value for key, value in changed.items()}
    params = config.load(ROOT / "params.yaml", overrides=overrides).train
    return schedule.plan(params, net, px=32, random_start=False)


def _net() -> nn.Module:
    return nets.build("test_resnet", num_classes=3)


def test_the_table_has_a_line_a_phase_with_what_learns() -> None:
    net = _net()
    lines = schedule_view.text(_planned(net), net, pictures=640, frozen=["once", "none"]).splitlines()
    frozen, finetune = (next(line for line in lines if line.startswith(name)) for name in ("frozen", "finetune"))
    head = sum(p.numel() for p in net.get_classifier().parameters())
    whole = sum(p.numel() for p in net.parameters())
    assert frozen.split()[:6] == ["frozen", "1", "10", "head:", "2", "tensors"]
    assert f"{head:,} ({head / whole:.1%})" in frozen
    assert finetune.split()[1:4] == ["3", "30", "all:"]
    assert f"{whole:,} (100.0%)" in finetune
    assert "0.003" in finetune


def test_rates_by_layer_are_said_as_a_range() -> None:
    net = _net()
    phases = _planned(net, phases={"a": {"trainable": "all", "lr": 0.5, "layer_decay": 0.5}})
    assert "0.5 (head) to" in " ".join(
        schedule_view.text(phases, net, pictures=64, frozen=["none"] * len(phases)).split()
    )


def test_the_picture_can_be_opened_and_has_a_curve_for_every_schedule(tmp_path: Path) -> None:
    net = _net()
    names = ("constant", "cosine", "step", "onecycle", "plateau")
    phases = _planned(net, layer_decay=0.7, phases={n: {"trainable": "last:1", "scheduler": n} for n in names})
    path = schedule_view.draw(phases, net, tmp_path / "schedule.png", pictures=640, rates={})
    with Image.open(path) as picture:
        assert picture.width > 1000


def test_a_ready_made_schedule_is_written_out_as_phases_that_mean_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # where nothing is prepared
    settings = {"train.phases": "gradual_unfreezing", "model.name": "scratch/resnet20"}
    asked = config.load(ROOT / "params.yaml", overrides=settings)
    schedule_view.run(asked, as_yaml=True)
    written = YAML(typ="safe").load(capsys.readouterr().out)
    out = config.load(ROOT / "params.yaml", overrides={**settings, "train.phases": written["phases"]})
    net = nets.build("scratch/resnet20", num_classes=3)
    plans = [schedule.plan(one.train, net, px=32, random_start=False) for one in (asked, out)]
    assert plans[0] == plans[1]


def test_without_prepared_pictures_the_steps_are_left_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    schedule_view.run(config.load(ROOT / "params.yaml"), as_yaml=False)
    printed = capsys.readouterr().out
    assert "finetune" in printed
    assert "steps are known once data/prepared/fashion_mnist is there" in printed


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "train.optimizer=adamww",
            "train.optimizer: adamww: timm has no such optimiser; did you mean adamw",
        ),
        ("augment.px=62", "model.name: scratch/alexnet takes pictures of 63 px or more"),
        ("model.recompute=true", "model.name: scratch/alexnet takes no recompute"),
    ],
)
def test_what_train_refuses_is_refused_here(
    setting: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "params.yaml").read_text().replace("tf_efficientnet_lite0", "scratch/alexnet")
    (tmp_path / "params.yaml").write_text(text)
    assert main(["schedule", "--set", "model.pretrained=false", setting]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert ("params.yaml:" in error) == (not message.startswith(setting.partition("=")[0]))  # it stands in no file
