"""The figures of an evaluation: counted by hand in small cases, against scikit-learn in large ones."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support

from pipeline.analysis import metrics
from pipeline.errors import UserError


def names(count: int) -> list[str]:
    return [f"class {index}" for index in range(count)]


def logits_for(predicted: list[int], *, classes: int) -> torch.Tensor:
    """Logits whose highest is at `predicted`."""
    return 3.0 * torch.nn.functional.one_hot(torch.tensor(predicted), classes).float()


def judge(logits: torch.Tensor, targets: list[int], *, seed: int = 0) -> metrics.Evaluation:
    return metrics.evaluate(
        logits,
        torch.tensor(targets),
        classes=names(logits.shape[1]),
        bootstrap=2000,
        confidence=0.95,
        seed=seed,
    )


def noisy(pictures: int, *, classes: int, actual: int | None = None) -> tuple[torch.Tensor, list[int]]:
    """Logits that lean to the right class, and targets among the first `actual` classes."""
    generator = torch.Generator().manual_seed(7)
    targets = torch.randint(actual or classes, (pictures,), generator=generator)
    logits = torch.randn(pictures, classes, generator=generator)
    logits[torch.arange(pictures), targets] += 1.5
    return logits, targets.tolist()


def test_counts_by_hand() -> None:
    evaluation = judge(logits_for([0, 0, 1, 2], classes=3), [0, 1, 1, 2])
    assert evaluation.confusion.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert evaluation.pictures == 4
    assert (evaluation.top1, evaluation.top1_error) == (0.75, 0.25)
    right, wrong = -np.log(np.e**3 / (np.e**3 + 2)), -np.log(1 / (np.e**3 + 2))
    assert evaluation.loss == pytest.approx((3 * right + wrong) / 4, rel=1e-6)
    assert evaluation.per_class.to_dict("list") == {
        "class": ["class 0", "class 1", "class 2"],
        "support": [1, 2, 1],
        "precision": [0.5, 1.0, 1.0],
        "recall": [1.0, 0.5, 1.0],
        "f1": [2 / 3, 2 / 3, 1.0],
    }


def test_shares_are_written_as_counted() -> None:
    evaluation = judge(logits_for([0] * 909 + [1] * 91, classes=2), [0] * 1000)
    assert evaluation.top1 == 0.909
    assert evaluation.top1_error == 0.091


@pytest.mark.parametrize("actual", [10, 7])
def test_agrees_with_scikit_learn(actual: int) -> None:
    logits, targets = noisy(400, classes=10, actual=actual)
    logits[:, 9] = -100.0  # with seven actual classes, one that is neither actual nor predicted
    evaluation = judge(logits, targets)
    predicted = logits.argmax(dim=1).tolist()
    each = precision_recall_fscore_support(targets, predicted, labels=range(10), zero_division=0)
    for column, expected in zip(["precision", "recall", "f1", "support"], each, strict=True):
        np.testing.assert_allclose(evaluation.per_class[column], expected)
    macro = precision_recall_fscore_support(targets, predicted, average="macro", zero_division=0)[:3]
    assert (evaluation.macro_precision, evaluation.macro_recall, evaluation.macro_f1) == pytest.approx(macro)


def test_top5_counts_the_five_highest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CHUNK", 64)
    logits, targets = noisy(300, classes=12)
    rank = (logits > logits[torch.arange(300), targets][:, None]).sum(dim=1)
    evaluation = judge(logits, targets)
    assert evaluation.top5 == int((rank < 5).sum()) / 300
    assert evaluation.top5_error == pytest.approx(1 - evaluation.top5)
    assert evaluation.top1 < evaluation.top5 < 1


@pytest.mark.parametrize("classes", [2, 5])
def test_top5_of_few_classes_is_one_and_says_so(classes: int) -> None:
    evaluation = judge(logits_for([0, 0], classes=classes), [0, 1])
    assert (evaluation.top5, evaluation.top5_error) == (1.0, 0.0)
    assert f"With {classes} classes top-5 accuracy is 1 by definition" in evaluation.notes[0]


def test_six_classes_have_a_real_top5() -> None:
    evaluation = judge(torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, 0.0]]).repeat(6, 1), [0, 1, 2, 3, 4, 5])
    assert evaluation.top5 == 5 / 6
    assert not any("top-5" in note for note in evaluation.notes)


def test_top5_of_equal_logits_is_no_less_than_top1() -> None:
    evaluation = judge(torch.zeros(10, 10), list(range(10)))
    assert (evaluation.top1, evaluation.top5) == (0.1, 0.5)


def test_interval_of_all_right_has_no_width_and_says_so() -> None:
    evaluation = judge(logits_for([0, 1] * 20, classes=2), [0, 1] * 20)
    assert (evaluation.top1_low, evaluation.top1_high) == (1.0, 1.0)
    assert any("All 40 test pictures are right" in note for note in evaluation.notes)


def test_interval_of_half_right_among_a_hundred() -> None:
    evaluation = judge(logits_for([0] * 100, classes=2), [0, 1] * 50)
    assert evaluation.top1_low == pytest.approx(0.4, abs=0.02)
    assert evaluation.top1_high == pytest.approx(0.6, abs=0.02)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rights = np.random.default_rng(3).binomial(500, 0.8, size=300)
    intervals = [
        metrics._interval(int(right), 500, resamples=400, confidence=0.9, seed=index)
        for index, right in enumerate(rights)
    ]
    covered = np.mean([low <= 0.8 <= high for low, high in intervals])
    assert covered == pytest.approx(0.9, abs=0.05)


def test_interval_is_repeated_by_its_seed() -> None:
    logits, targets = noisy(200, classes=6)
    first, again, other = judge(logits, targets, seed=1), judge(logits, targets, seed=1), judge(logits, targets, seed=2)
    assert (first.top1_low, first.top1_high) == (again.top1_low, again.top1_high)
    assert (first.top1_low, first.top1_high) != (other.top1_low, other.top1_high)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_logits_are_refused(bad: float) -> None:
    logits = logits_for([0, 1, 2, 0], classes=3)
    logits[1, 0] = logits[3, 0] = logits[3, 2] = bad
    with pytest.raises(UserError, match="non-finite logits for 2 of 4 pictures; train it again with a lower") as error:
        judge(logits, [0, 1, 2, 0])
    assert "\n" not in str(error.value)


def test_classes_without_pictures_are_zero_and_noted() -> None:
    evaluation = judge(logits_for([0, 1, 2, 0], classes=9), [0, 1, 1, 0])
    assert evaluation.per_class.loc[2, ["precision", "recall", "f1"]].tolist() == [0.0, 0.0, 0.0]
    assert evaluation.macro_recall == pytest.approx((1 + 0.5 + 0) / 3)
    assert any(
        note.startswith("No test picture of class 2, class 3, class 4, class 5, class 6 and 2 more:")
        for note in evaluation.notes
    )
    assert any(note.startswith("Never predicted: class 3,") for note in evaluation.notes)


def test_nothing_to_note() -> None:
    logits, targets = noisy(300, classes=6)
    assert judge(logits, targets).notes == ()


def test_flat_has_the_names_of_metrics_json() -> None:
    logits, targets = noisy(50, classes=6)
    evaluation = judge(logits, targets)
    figures = metrics.flat(evaluation)
    assert list(figures) == [
        "test/top1",
        "test/top5",
        "test/top1_error",
        "test/top5_error",
        "test/loss",
        "test/top1_low",
        "test/top1_high",
        "test/macro_f1",
        "test/macro_precision",
        "test/macro_recall",
        "test/pictures",
    ]
    assert {type(value) for value in figures.values()} == {float}
    assert figures["test/pictures"] == 50
    assert figures["test/top1"] == evaluation.top1


def test_predictions_have_a_row_a_picture(tmp_path: Path) -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    frame = metrics.predictions(["a.png", "b.png"], torch.tensor([0, 1]), logits, ["cat", "dog", "T-shirt/top"])
    assert list(frame.columns) == [
        "key",
        "actual",
        "predicted",
        "correct",
        "confidence",
        "p_cat",
        "p_dog",
        "p_T-shirt/top",
    ]
    assert frame[["key", "actual", "predicted", "correct"]].to_numpy().tolist() == [
        ["a.png", "cat", "cat", True],
        ["b.png", "dog", "T-shirt/top", False],
    ]
    probabilities = frame.filter(regex="^p_")
    assert set(probabilities.dtypes) == {np.dtype("float32")}
    assert frame["confidence"].dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(frame["confidence"], probabilities.max(axis=1))

    path = tmp_path / "predictions.parquet"
    metrics.write_parquet(frame, path)
    pd.testing.assert_frame_equal(pd.read_parquet(path), frame)
    assert list(tmp_path.iterdir()) == [path]


def test_confusion_rows_name_the_classes(tmp_path: Path) -> None:
    rows = metrics.confusion_rows(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), ["cat", "dog, wet"])
    path = tmp_path / "confusion.csv"
    metrics.write_csv(rows, path)
    assert path.read_text() == 'actual,predicted\ncat,cat\n"dog, wet",cat\n"dog, wet","dog, wet"\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    path.write_text("old")
    with pytest.raises(ValueError, match="Duplicate column names"):
        metrics.write_parquet(pd.DataFrame([[1, 2]], columns=["a", "a"]), path)
    assert path.read_text() == "old"
