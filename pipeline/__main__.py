"""The command line: `python -m pipeline COMMAND`, or `thaw COMMAND`.

Exit codes: 0 done, 2 the user's mistake (one line on standard error), 1 ours, 143 stopped.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from types import FrameType
from typing import Any, NamedTuple, NoReturn, get_args

from pipeline import machine
from pipeline.errors import UserError, nearest


def _stage(name: str) -> Callable[[argparse.Namespace], None]:
    def run(_: argparse.Namespace) -> None:
        from pipeline import config

        params = config.load()
        _imported(f"pipeline.stages.{name}").run(params)

    return run


def _imported(module: str) -> Any:
    with machine.large_import():
        return import_module(module)


def _check(args: argparse.Namespace) -> None:
    from pipeline import config, experiment

    loaded = config.load()
    experiment.check_names(loaded)
    if args.show:
        print(loaded.model_dump_json(indent=2))


def _experiment(args: argparse.Namespace) -> None:
    from pipeline import experiment

    experiment.run(model=args.model, epochs=args.epochs, settings=args.set)


def _study(args: argparse.Namespace) -> None:
    from pipeline import study

    if args.size not in get_args(study.Size):
        raise UserError(f"--size {args.size}: it is small or full{nearest(args.size, get_args(study.Size))}")
    if args.name:
        study.run(args.name, size=args.size, variants=args.variants)
    else:
        print("\n".join(f"{name:<12} {study.read(name).title}" for name in study.names()))


def _summary(args: argparse.Namespace) -> None:
    from pipeline.analysis import summary

    summary.run(
        args.names,
        px=args.px,
        in_chans=args.in_chans,
        num_classes=args.num_classes,
        format=args.format,
        compare=args.compare,
        batch=args.batch,
    )


def _restore(args: argparse.Namespace) -> None:
    from pathlib import Path

    from pipeline import config
    from pipeline.training import restoring

    params = config.load()
    restoring.run(
        dataset=params.data.name,
        out=Path(args.out),
        epochs=args.epochs,
        batch_size=params.train.batch_size,
        lr=args.lr,
        px=params.px,
        in_chans=params.model.in_chans,
        seed=params.train.seed,
        noise=args.noise,
        hole=args.hole,
        experiment=params.tracking.experiment,
    )


def _schedule(args: argparse.Namespace) -> None:
    from pipeline import config
    from pipeline.analysis import schedule_view

    schedule_view.run(config.load(overrides=config.parse_settings(args.set)), as_yaml=args.yaml)


def _batch_size(args: argparse.Namespace) -> None:
    from pipeline import config
    from pipeline.training import memory

    memory.run(config.load(overrides=config.parse_settings(args.set)))


def _crossval(args: argparse.Namespace) -> None:
    from pipeline import config, crossval

    crossval.run(config.load(), folds=args.folds, seed=args.seed)


def _ablate(args: argparse.Namespace) -> None:
    from pipeline import ablation

    ablation.run(args.off, seeds=args.seeds, name=args.name)


def _tune(args: argparse.Namespace) -> None:
    from pathlib import Path

    from pipeline import tune

    tune.run(
        trials=args.trials,
        name=args.name,
        space=Path(args.space),
        storage=args.storage,
        pruner=args.pruner,
        as_experiment=not args.no_experiment,
        apply=args.apply,
    )


def _ensemble(args: argparse.Namespace) -> None:
    from pipeline.analysis import ensemble

    ensemble.run(args.models, name=args.name)


def _compare(args: argparse.Namespace) -> None:
    from pipeline import config
    from pipeline.analysis import compare

    compare.run(args.experiment or config.load().tracking.experiment)


def _models(args: argparse.Namespace) -> None:
    from pipeline import nets

    found = nets.names(args.search)
    if not found:
        raise UserError(f"no net matches {args.search}; try SEARCH='resnet*'")
    print("\n".join(found))


def _ui(args: argparse.Namespace) -> None:
    from pipeline import tracking

    tracking.ui(args.port)


def _predict(args: argparse.Namespace) -> None:
    from pipeline import config
    from pipeline.analysis import predict

    predict.run(args.pictures, model=args.model or config.load().model.name, top=args.top)


class Argument(NamedTuple):
    """One argument of a command."""

    name: str
    help: str
    type: type = str
    default: object = None
    many: bool = False


class Command(NamedTuple):
    """A row of the command table."""

    help: str
    run: Callable[[argparse.Namespace], None]
    arguments: tuple[Argument, ...] = ()


COMMANDS = {
    "download": Command("stage: bring the dataset to data/raw/", _stage("download")),
    "weights": Command("stage: bring the pretrained weights to models/pretrained/", _stage("weights")),
    "augment": Command("stage: split, pack and preview the pictures in data/prepared/", _stage("augment")),
    "train": Command("stage: freeze, then fine-tune, into models/NAME/train/", _stage("train")),
    "evaluate": Command("stage: judge the model on the test split, into models/NAME/evaluate/", _stage("evaluate")),
    "check": Command(
        "check params.yaml",
        _check,
        (Argument("--show", "print every parameter, defaults included", type=bool, default=False),),
    ),
    "experiment": Command(
        "what `make train` calls: the chain with other parameters, as a DVC experiment",
        _experiment,
        (
            Argument("--model", "net to train, in place of model.name", default=""),
            Argument("--epochs", "epochs of the last phase, in place of the file's", type=int),
            Argument("--set", "further parameters, as section.key=value", default=[], many=True),
        ),
    ),
    "schedule": Command(
        "print the phases: how long, what learns, at which rates; trains nothing",
        _schedule,
        (
            Argument("--yaml", "as phases that can stand under train.phases", type=bool, default=False),
            Argument("--set", "parameters, as section.key=value", default=[], many=True),
        ),
    ),
    "batch-size": Command(
        "find the largest batch that the device's memory holds",
        _batch_size,
        (Argument("--set", "parameters, as section.key=value", default=[], many=True),),
    ),
    "summary": Command(
        "a net layer by layer: sizes, parameters, multiply-adds, memory; or nets side by side",
        _summary,
        (
            Argument("names", "nets, as `models` lists them", many=True),
            Argument("--px", "side of the pictures, in place of each net's own", type=int),
            Argument("--in-chans", "channels of the pictures", type=int, default=3),
            Argument("--num-classes", "classes", type=int, default=1000),
            Argument("--format", "table, json or html", default="table"),
            Argument("--compare", "side by side, timed on this machine", type=bool, default=False),
            Argument("--batch", "pictures a batch, when timing", type=int, default=4),
        ),
    ),
    "study": Command(
        "run a group of experiments of experiments/, or list them",
        _study,
        (
            Argument("--name", "study to run: a folder of experiments/", default=""),
            Argument("--size", "small (some 20 minutes on two cores) or full (the paper's)", default="small"),
            Argument("--variants", "some of its variants alone; then no results are written", default=[], many=True),
        ),
    ),
    "crossval": Command(
        "k-fold cross-validation: a fresh net per fold, and predictions for every picture",
        _crossval,
        (
            Argument("--folds", "folds, 2 to 100", type=int, default=5),
            Argument("--seed", "of the division into folds, in place of augment.seed", type=int),
        ),
    ),
    "ablate": Command(
        "what each choice brings: switch it off, and train with several seeds",
        _ablate,
        (
            Argument("--off", "choices and their values without them, such as train.mixup=0", default=[], many=True),
            Argument("--seeds", "seeds that everything is trained with", type=int, default=[0, 1, 2], many=True),
            Argument("--name", "of the result's folder, in place of the net's", default=""),
        ),
    ),
    "tune": Command(
        "search good parameters with Optuna; several processes may share one search",
        _tune,
        (
            Argument("--trials", "over all processes and starts together", type=int, default=20),
            Argument("--name", "of the search, in place of the net's", default=""),
            Argument("--space", "file of the parameters and their ranges", default="experiments/tune/space.yaml"),
            Argument("--storage", "URL of a database, in place of a sqlite file", default=""),
            Argument("--pruner", "median (end poor trials early) or none", default="median"),
            Argument("--no-experiment", "do not train the best as a DVC experiment", type=bool, default=False),
            Argument("--apply", "write the best into params.yaml", type=bool, default=False),
        ),
    ),
    "ensemble": Command(
        "average the probabilities of trained models, and judge them like one",
        _ensemble,
        (
            Argument("models", "nets that have been trained, or model.safetensors files", many=True),
            Argument("--name", "of the result's folder, in place of the members' names", default=""),
        ),
    ),
    "restore": Command(
        "train a U-Net to restore damaged pictures, for the weights of its encoder",
        _restore,
        (
            Argument("--epochs", "passes over the training pictures", type=int, default=20),
            Argument("--lr", "peak learning rate", type=float, default=1e-3),
            Argument(
                "--noise", "standard deviation of the noise, as a share of the full scale", type=float, default=0.1
            ),
            Argument("--hole", "share of the picture that is blanked", type=float, default=0.2),
            Argument("--out", "folder for the encoder's weights and the pictures", default="models/restored"),
        ),
    ),
    "predict": Command(
        "name what is in pictures, with a trained model",
        _predict,
        (
            Argument("pictures", "picture files", many=True),
            Argument("--model", "net whose trained model to use, in place of model.name", default=""),
            Argument("--top", "classes to show per picture", type=int, default=3),
        ),
    ),
    "compare": Command(
        "MLflow's runs as a table, best first",
        _compare,
        (Argument("--experiment", "MLflow experiment, in place of tracking.experiment", default=""),),
    ),
    "models": Command(
        "list the nets to be had",
        _models,
        (Argument("--search", "pattern such as 'resnet*'", default="*"),),
    ),
    "ui": Command("MLflow's pages on 127.0.0.1", _ui, (Argument("--port", "port", type=int, default=5000),)),
}


class _Parser(argparse.ArgumentParser):
    """Answers a wrong argument in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="thaw", description="Transfer learning for labelled pictures.")
    rows = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        row = rows.add_parser(name, help=command.help, description=command.help)
        for argument in command.arguments:
            _add(row, argument)
    return parser


def _add(parser: argparse.ArgumentParser, argument: Argument) -> None:
    if argument.type is bool:
        parser.add_argument(argument.name, help=argument.help, action="store_true")
    elif argument.many:
        nargs = "*" if argument.name.startswith("-") else "+"
        parser.add_argument(
            argument.name, help=argument.help, type=argument.type, nargs=nargs, default=argument.default
        )
    else:
        parser.add_argument(argument.name, help=argument.help, type=argument.type, default=argument.default)


def _stop(number: int, _: FrameType | None) -> NoReturn:
    # Before Lightning sees the signal: it would end the stage with 0, and DVC would record a half-trained model.
    signal.signal(number, signal.SIG_IGN)
    print(f"stopped by {signal.Signals(number).name}; no file of this stage was changed", file=sys.stderr, flush=True)
    raise SystemExit(143)


def _place(error: UserError, settings: Sequence[str]) -> str:
    """Where the mistake stands, for an error whose message does not say: in params.yaml, or among what is set."""
    if not error.parameter:
        return ""
    for key in (word.partition("=")[0] for word in settings):
        if f"{key}.".startswith(f"{error.parameter}.") or f"{error.parameter}.".startswith(f"{key}."):
            return f"{key}: "
    from pipeline import config

    return f"{config.where(error.parameter)}: "


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and gives back the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        print(f"thaw: {words[0]}: no such command{nearest(words[0], COMMANDS)}", file=sys.stderr)
        return 2
    args = _parser().parse_args(words)
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network for its version at each import
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        COMMANDS[args.command].run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # What reads our output has seen enough (`... | head`); nothing more can be said, at the end either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        print(f"thaw {args.command}: {_place(error, getattr(args, 'set', []))}{error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
