"""auto_tune takes what is fastest, once, and leaves net and random numbers alone."""

import copy
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline import config, machine, nets
from pipeline.data import store
from pipeline.data.store import Row, Store
from pipeline.errors import UserError
from pipeline.parameters import Config
from pipeline.training import schedule, tuning
from pipeline.training.classifier import Classifier
from pipeline.training.progress import Progress
from pipeline.training.schedule import Phase
from pipeline.training.tuning import Pace, Way
from pipeline.training.weights import ModelCard

ROOT = Path(__file__).parents[2]
PX = 32
CARD = ModelCard(
    name="scratch/resnet20",
    in_chans=3,
    stem="default",
    classes=("a", "b", "c"),
    px=PX,
    pack_px=PX,
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    start="random",
    start_source="a test",
    fast_dev_run=False,
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(0)
    rows = (
        (Row(f"{i}", split, i % 3, 0, PX, PX), rng.integers(0, 256, (PX, PX, 3), dtype=np.uint8))
        for i, split in enumerate(["train"] * 12 + ["val"] * 6)
    )
    store.write(folder, rows, dataset="tiny", classes=CARD.classes, px=PX, channels=3, skipped=[])
    return Store(folder)


def _config(**changed: Any) -> Config:
    phases = {"head": {"trainable": "head", "epochs": 9}, "all": {"trainable": "all", "epochs": 2}}
    knobs = {"auto_tune": True, "batch_size": 6, "accelerator": "cpu", "mixup": 0.2, "phases": phases, **changed}
    return config.load(ROOT / "params.yaml", overrides={f"train.{key}": value for key, value in knobs.items()})


def _tuned(
    pictures: Store, asked: Config, folder: Path, net: nn.Module | None = None, *, cached: Collection[str] = ()
) -> tuple[dict[str, Any], Progress]:
    net = net or nets.build("scratch/resnet20", num_classes=3, drop_rate="auto")
    progress = Progress(folder, facts={}, leader=True)
    progress.begin("run")
    phases = schedule.plan(asked.train, net, px=PX, random_start=False)
    params = tuning.tuned(asked, pictures, net, CARD, phases=phases, cached=cached, progress=progress)
    return {name: getattr(params, name) for name in ("precision", "channels_last", "compile", "workers")}, progress


class _Stub:
    """Gives each way of computing a pace, and remembers what was tried."""

    def __init__(self, steps: dict[Way, float], *, compiling: float = 0.0) -> None:
        self.steps, self.compiling = steps, compiling
        self.tried: list[Way] = []
        self.phases: set[str] = set()

    def __call__(self, module: Classifier, batches: Any, *, device: torch.device, **_: Any) -> Pace:  # noqa: ARG002
        way = Way(module.precision, module._memory_format == torch.channels_last, module._params.compile)
        self.tried.append(way)
        self.phases.add(module.phase.name)
        return Pace(first=self.compiling if way.compile else 0.1, step=self.steps[way])


PLAIN, LAST = Way("32-true", False, False), Way("32-true", True, False)
BF16, BF16_LAST = Way("bf16-mixed", False, False), Way("bf16-mixed", True, False)
COMPILED = Way("32-true", True, True)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(machine, "has_bf16", lambda _: True)
    monkeypatch.setattr(tuning, "PAYS", 0)
    return tmp_path


@pytest.mark.parametrize(
    ("steps", "compiling", "expected"),
    [
        ({PLAIN: 4.0, LAST: 3.0, BF16: 2.0, BF16_LAST: 1.0}, 0.0, BF16_LAST),
        ({PLAIN: 3.0, LAST: 2.0, BF16: 5.0, BF16_LAST: 4.0}, 0.0, LAST),  # bf16 is not assumed to be faster
        ({PLAIN: 3.0, LAST: 2.99, BF16: 3.0, BF16_LAST: 2.98}, 0.0, PLAIN),  # nor is what cannot be told apart
        ({PLAIN: 900.0, LAST: 600.0, BF16: 1500.0, BF16_LAST: 1200.0, COMPILED: 150.0}, 900.0, COMPILED),
        ({PLAIN: 900.0, LAST: 600.0, BF16: 1500.0, BF16_LAST: 1200.0, COMPILED: 150.0}, 2100.0, LAST),  # too dear for 4
    ],
)
def test_the_fastest_way_is_chosen(
    steps: dict[Way, float],
    compiling: float,
    expected: Way,
    pictures: Store,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stub = _Stub(steps, compiling=compiling)
    monkeypatch.setattr(tuning, "pace", stub)
    choice, _ = _tuned(pictures, _config(), here / "progress")
    assert {name: choice[name] for name in Way._fields} == expected._asdict()
    assert (COMPILED in stub.tried) == (COMPILED in steps)  # not where training is over sooner
    assert stub.phases == {"all"}


def test_a_way_that_memory_does_not_hold_is_left_out(
    pictures: Store,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stub = _Stub({BF16: 2.0, BF16_LAST: 1.0})

    def pace(module: Classifier, batches: Any, **named: Any) -> Pace:
        if module.precision == "32-true":
            raise torch.OutOfMemoryError
        return stub(module, batches, **named)

    monkeypatch.setattr(tuning, "pace", pace)
    choice, progress = _tuned(pictures, _config(), here / "progress")
    assert {name: choice[name] for name in Way._fields} == BF16_LAST._asdict()
    assert [row["precision"] for row in progress.tuned["table"]] == ["bf16-mixed"] * 3
    assert "32-true, True, False needs more memory than there is" in capsys.readouterr().out


def test_where_memory_holds_no_way_it_ends_as_the_training_would(
    pictures: Store, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pace(*_: Any, **__: Any) -> Pace:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(tuning, "pace", pace)
    with pytest.raises(torch.OutOfMemoryError):
        _tuned(pictures, _config(), here / "progress")
    assert not list((here / "data/cache/tuned").glob("*.json"))


@pytest.mark.parametrize(("cached", "expected"), [((), "long"), (("long",), "short")])
def test_frozen_work_that_is_done_once_does_not_count_for_every_epoch(
    cached: Collection[str], expected: str, pictures: Store, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = _Stub({PLAIN: 4.0, LAST: 3.0, BF16: 2.0, BF16_LAST: 1.0, COMPILED._replace(precision="bf16-mixed"): 9.0})
    monkeypatch.setattr(tuning, "pace", stub)
    phases = {"long": {"trainable": "last:1", "epochs": 500}, "short": {"trainable": "all", "epochs": 2}}
    _tuned(pictures, _config(phases=phases), here / "progress", cached=cached)
    assert stub.phases == {expected}


def test_workers_load_where_the_training_process_is_kept_waiting(
    pictures: Store, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning.machine, "cores", lambda: 2)
    for waiting, with_workers, expected in ((1.01, 0.5, 0), (2.0, 1.1, 2), (2.0, 1.99, 0)):
        times = iter([1.0] * 4 + [waiting, with_workers])
        monkeypatch.setattr(tuning, "pace", lambda *_, times=times, **__: Pace(first=0.1, step=next(times)))
        choice, progress = _tuned(pictures, _config(), here / str(waiting + with_workers))
        assert choice["workers"] == expected
        assert [row["workers"] for row in progress.tuned["table"][4:]] == ([0] if waiting < 1.03 else [0, 2])
        for kept in (here / "data" / "cache" / "tuned").iterdir():
            kept.unlink()


def test_a_later_training_takes_the_choice_without_a_trial_and_a_different_one_does_not(
    pictures: Store, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = _Stub({PLAIN: 4.0, LAST: 3.0, BF16: 2.0, BF16_LAST: 1.0})
    monkeypatch.setattr(tuning, "pace", stub)
    first, before = _tuned(pictures, _config(), here / "one")
    tried = len(stub.tried)
    second, after = _tuned(pictures, _config(lr=0.1), here / "two")
    assert (second, after.tuned) == (first, before.tuned)
    assert len(stub.tried) == tried
    _tuned(pictures, _config(batch_size=4), here / "three")
    assert len(stub.tried) == 2 * tried


def test_a_short_training_is_not_kept_waiting_by_a_trial_whatever_a_longer_one_found(
    pictures: Store, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = _Stub({PLAIN: 0.04, LAST: 0.03, BF16: 0.02, BF16_LAST: 0.01})
    monkeypatch.setattr(tuning, "pace", stub)
    monkeypatch.setattr(tuning, "PAYS", 3)
    choice, progress = _tuned(pictures, _config(), here / "short")
    assert choice == {"precision": "32-true", "channels_last": True, "compile": False, "workers": "auto"}
    assert (stub.tried, progress.tuned) == ([], {"choice": choice, "table": []})
    told = "auto_tune: phase all is too short to be tried: it computes as it is set\n"
    assert capsys.readouterr().out == told
    long = {"all": {"trainable": "all", "epochs": 138}}
    assert _tuned(pictures, _config(phases=long), here / "long")[0]["precision"] == "bf16-mixed"
    capsys.readouterr()
    tried = len(stub.tried)
    assert _tuned(pictures, _config(), here / "short again")[0] == choice
    assert len(stub.tried) == tried
    assert capsys.readouterr().out == told


@pytest.mark.parametrize(
    ("steps", "step_s", "expected", "asked"),
    [
        (95, 100.0, False, False),  # not even the fewest steps
        (96, 100.0, True, True),  # slow steps: a few of them are a trial
        (96, 1.25, True, True),
        (96, 1.0, False, True),  # ten seconds of a way are ten steps
        (120, 1.0, True, True),
        (275, 0.01, False, True),
        (276, 0.01, True, False),
    ],
)
def test_a_trial_pays_where_it_takes_a_third_of_the_phase_at_most(
    steps: int, step_s: float, expected: bool, asked: bool
) -> None:
    calls: list[float] = []

    def measured() -> float:
        calls.append(step_s)
        return step_s

    assert tuning.pays(steps, ways=4, step_s=measured) == expected
    assert bool(calls) == asked


def test_a_trial_on_a_busy_machine_says_so(
    pictures: Store, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for loaded, told in ((0.9, False), (0.5, True)):
        times = iter([1.0] * 4 + [loaded])
        monkeypatch.setattr(tuning, "pace", lambda *_, times=times, **__: Pace(first=0.1, step=next(times)))
        _tuned(pictures, _config(batch_size=4 + told), here / str(loaded))
        assert ("the machine was busy otherwise" in capsys.readouterr().err) == told


def test_slow_steps_are_counted_often_enough_to_tell(
    pictures: Store, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "LONGEST_S", 0.0)
    counted: list[int] = []
    median = tuning.statistics.median
    monkeypatch.setattr(tuning.statistics, "median", lambda seconds: [counted.append(len(seconds)), median(seconds)][1])
    _tuned(pictures, _config(), here / "progress")
    assert counted == [tuning.FEWEST] * len(counted) != []


def test_a_training_that_is_long_enough_to_be_compiled_is_tried_anew(
    pictures: Store, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = _Stub({PLAIN: 9.0, LAST: 8.0, BF16: 9.0, BF16_LAST: 9.0, COMPILED: 2.0}, compiling=30.0)
    monkeypatch.setattr(tuning, "pace", stub)
    assert not _tuned(pictures, _config(), here / "short")[0]["compile"]
    long = {"all": {"trainable": "all", "epochs": 200}}
    assert _tuned(pictures, _config(phases=long), here / "long")[0]["compile"]


def test_a_resumed_training_computes_as_it_began(pictures: Store, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = _Stub({PLAIN: 4.0, LAST: 3.0, BF16: 2.0, BF16_LAST: 1.0})
    monkeypatch.setattr(tuning, "pace", stub)
    first, _ = _tuned(pictures, _config(), here / "progress")
    for kept in (here / "data" / "cache" / "tuned").iterdir():
        kept.unlink()
    stub.steps = {PLAIN: 1.0, LAST: 3.0, BF16: 2.0, BF16_LAST: 4.0}
    resumed, _ = _tuned(pictures, _config(), here / "progress")
    assert resumed == first


def test_a_trial_leaves_net_and_random_numbers_as_they_were(
    pictures: Store, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "STEPS", 1)
    net = nets.build("scratch/resnet20", num_classes=3)
    before = copy.deepcopy(net.state_dict())
    learns = [parameter.requires_grad for parameter in net.parameters()]
    own, legacy = torch.get_rng_state(), np.random.get_state()[1]
    _, progress = _tuned(pictures, _config(), here / "progress", net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [parameter.requires_grad for parameter in net.parameters()] == learns
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(torch.get_rng_state(), own)
    assert np.array_equal(np.random.get_state()[1], legacy)
    ways = {(row["precision"], row["channels_last"]) for row in progress.tuned["table"]}
    assert ways == {(precision, layout) for precision in ("32-true", "bf16-mixed") for layout in (False, True)}
    assert all(row["step_ms"] > 0 for row in progress.tuned["table"])


def test_without_it_nothing_is_chosen(pictures: Store, here: Path) -> None:
    choice, progress = _tuned(pictures, _config(auto_tune=False, precision="bf16-mixed"), here / "progress")
    assert choice["precision"] == "bf16-mixed"
    assert not progress.tuned


def test_several_processes_are_not_tuned() -> None:
    with pytest.raises(UserError, match="tries one process"):
        _config(devices=2)
    _config(devices=2, auto_tune=False)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"choice": {}, "table": []}'])
def test_a_kept_trial_that_cannot_be_read_is_made_again(here: Path, content: str) -> None:
    assert here
    ways = {"precision": "32-true", "channels_last": True, "compile": False, "workers": 0}
    tuning.keep("a", tuning.Choice(**ways), [tuning.Row(**ways, step_ms=1.0, first_s=1.0, chosen=True)])
    assert tuning.known("a") is not None
    tuning._kept("a").write_text(content)
    assert tuning.known("a") is None


def test_phases_do_not_share_a_key(pictures: Store) -> None:
    asked = _config()
    phases: list[Phase] = schedule.plan(
        asked.train, nets.build("scratch/resnet20", num_classes=3), px=PX, random_start=False
    )
    keys = {tuning.key_of(asked.model, asked.train, phase, pictures, px=PX, total_steps=9) for phase in phases}
    assert len(keys) == 2


def test_a_choice_is_kept_by_what_loading_depends_on(pictures: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _config()
    phase, _ = schedule.plan(asked.train, nets.build("scratch/resnet20", num_classes=3), px=PX, random_start=False)

    def key() -> str:
        return tuning.key_of(asked.model, asked.train, phase, pictures, px=PX, total_steps=9)

    first = key()
    monkeypatch.setattr("platform.node", lambda: "the name of another container")
    assert key() == first
    for changed in ({"px": 256}, {"channels": 1}, {"dataset": "another"}):
        monkeypatch.setattr(pictures, "meta", replace(pictures.meta, **changed))  # type: ignore[arg-type]
        assert key() != first
        monkeypatch.undo()
