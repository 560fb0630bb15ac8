import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.analysis import anatomy, side_by_side, summary
from pipeline.errors import UserError


def printed(capsys: pytest.CaptureFixture[str], *names: str, **arguments: Any) -> str:
    settings = {"px": None, "in_chans": 1, "num_classes": 10, "format": "table", "compare": False, "batch": 2}
    summary.run(list(names), **{**settings, **arguments})
    return capsys.readouterr().out


def test_table_has_a_line_for_each_layer_then_the_totals_and_shares(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.rstrip() for line in printed(capsys, "scratch/lenet5").splitlines()]
    assert lines[0] == "scratch/lenet5 at 1 x 32 x 32, 10 classes"
    assert lines[2].split("  ")[0] == "layer"
    assert lines[4].split() == ["c1", "Conv2d", "5", "1", "0", "28x28", "6x28x28", "156", "117.6k", "18.82kB", "5"]
    assert lines[5].split() == ["(net)", "(tanh)", "6x28x28", "18.82kB", "5"]
    assert lines[15].split() == ["output", "Linear", "10", "850", "840", "40B", "32"]
    assert lines[17].split() == ["total", "61,706", "416.5k", "58.89kB"]
    shares = lines.index(next(line for line in lines if line.startswith("where the parameters go, by block")))
    assert lines[shares + 2].split() == ["c5", "48,120", "78.0%", "█" * 16]


def test_a_pipe_gets_names_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = printed(capsys, "densenet121", in_chans=3)
    assert "\nfeatures.denseblock4.denselayer16.norm1.act  ReLU " in out


def test_a_narrow_terminal_gets_two_lines_a_layer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    lines = [line.rstrip() for line in printed(capsys, "densenet121", in_chans=3).splitlines()]
    assert max(map(len, lines)) <= 80
    at = lines.index(next(line for line in lines if line.startswith("features.denseblock4.denselayer16.conv2 ")))
    assert lines[at].split() == ["features.denseblock4.denselayer16.conv2", "7x7", "36,864", "6.272kB"]
    assert lines[at + 1].split() == ["Conv2d", "3,", "1,", "1", "32x7x7", "1.806M", "2071"]
    compared = printed(capsys, "scratch/lenet5", compare=True).splitlines()
    assert max(map(len, compared)) <= 80
    assert compared[3].split()[:3] == ["scratch/lenet5", "61,706", "58.89kB"]


def test_marks_are_explained_where_they_stand(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "tf_efficientnet_b0", in_chans=3)
    assert "111x111 ≠" in out
    assert "\n≠: not the size" in out
    assert "3 g96 " in out
    assert " 11 + all" in out
    assert "≠" not in printed(capsys, "scratch/lenet5")
    vit = printed(capsys, "vit_tiny_patch16_224", in_chans=3)
    assert "\nparameters outside layers: cls_token 192, pos_embed 37,824\n" in vit
    assert any(line.split() == ["parameters", "outside", "layers", "38,016"] for line in vit.splitlines())


def test_json_has_the_documented_keys_and_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("scratch/lenet5", "scratch/resnet20")
    found = json.loads(printed(capsys, *names, format="json", px=40))
    assert found["schema"] == 1
    assert [net["net"] for net in found["nets"]] == list(names)
    docs = (Path(__file__).parents[2] / "docs/summary.md").read_text()
    for net in found["nets"]:
        assert net["px"] == 40
        for quantity in ("parameters", "macs", "activation_bytes"):
            assert sum(layer[quantity] for layer in net["layers"]) == net[quantity]
        for key in [*net, *net["layers"][0], *net["layers"][0]["window"], "name", "used", "value", "share"]:
            assert f"`{key}`" in docs, key
    first = found["nets"][0]["layers"][0]
    assert first["window"]["kernel"] == [5, 5]
    assert (first["formula"], first["output"], first["agrees"]) == ([36, 36], [6, 36, 36], True)
    assert (first["receptive_field"], first["sees_whole_picture"]) == ([5, 5], False)


class Page(HTMLParser):
    """Collects what a page refers to, checks that its tags close, and keeps its text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.rows = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.rows += tag == "tr"
        self.fetched += [str(value) for key, value in attrs if key in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("compare", [False, True])
def test_page_is_whole_and_fetches_nothing(capsys: pytest.CaptureFixture[str], compare: bool) -> None:
    out = printed(capsys, "scratch/lenet5", format="html", compare=compare)
    page = Page()
    page.feed(out)
    assert page.open == page.fetched == []
    assert "url(" not in out
    assert "61,706" in out
    if not compare:
        assert page.rows > 12 + 2
        assert 'style="width: 77.98%"' in out  # c5's share of the parameters


def test_nets_side_by_side_are_measured_and_looked_up(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(printed(capsys, "scratch/lenet5", "test_resnet", format="json", compare=True, px=64))
    assert found["timing"] == {"threads": 1, "batch": 2, "rounds": side_by_side.ROUNDS}
    assert [row["net"] for row in found["compared"]] == ["scratch/lenet5", "test_resnet"]
    for row in found["compared"]:
        alone = anatomy.measure(row["net"], px=64, in_chans=1, num_classes=10)
        assert (row["parameters"], row["macs"]) == (alone.parameters, alone.macs)
        assert (row["activation_bytes"], row["peak_bytes"]) == (alone.activation_bytes, alone.peak_bytes)
        assert 0 < row["slowest"] <= row["pictures_per_second"] <= row["fastest"]
        assert row["top1_error"] is row["top5_error"] is row["weights"] is None
    table = printed(capsys, "scratch/lenet5", compare=True)
    assert table.splitlines()[2].split()[-3:] == ["-", "-", "-"]
    assert "1 thread of the CPU, float32, batches of 2" in table


def test_published_errors_are_those_of_torchvision_s_first_weights() -> None:
    assert side_by_side.published("resnet50") == (23.87, 7.138)
    assert side_by_side.published("resnet50.a1_in1k") == side_by_side.published("scratch/resnet50") == (23.87, 7.138)
    assert side_by_side.published("vgg16") == (28.408, 9.618)
    for name in ("scratch/lenet5", "vit_tiny_patch16_224", "resnet26", "fasterrcnn_resnet50_fpn"):
        assert side_by_side.published(name) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "jsn"}, "--format jsn: no such format; did you mean json?"),
        ({"px": 0}, "--px 0: give 1 or more"),
        ({"batch": 0}, "--batch 0: give 1 or more"),
        ({"px": 28}, "scratch/lenet5 takes pictures of 32 px or more, got 28; give another --px"),
    ],
)
def test_mistakes_are_told_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        printed(capsys, "scratch/lenet5", **arguments)
    assert str(error.value) == message


def test_unknown_net_is_refused_before_any_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"^scratch/lenet: no such net; did you mean scratch/lenet5"):
        printed(capsys, "scratch/lenet5", "scratch/lenet")
    assert capsys.readouterr().out == ""


def test_importing_the_command_loads_no_torch() -> None:
    code = "import sys; from pipeline.analysis import summary; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1.000k"), (117_600, "117.6k"), (15_470_264_320, "15.47G"), (2e12, "2000G")],
)
def test_short_numbers_have_four_figures(value: float, text: str) -> None:
    assert summary.short(value) == text
