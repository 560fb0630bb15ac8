"""The train stage: phases of freezing and thawing, from what `weights` fetched to models/NAME/train."""

from pipeline import paths
from pipeline.analysis import metrics
from pipeline.data.store import Store
from pipeline.parameters import Config
from pipeline.training import job
from pipeline.training.fit import rank
from pipeline.training.job import Job


def run(config: Config) -> None:
    """Trains phase by phase; writes the last one's best weights, with checkpoints, curves and the run's id."""
    store = Store(paths.prepared(config.data.name))
    if rank() == 0:
        store.verify()
    rows = job.run(
        Job(
            config=config,
            store=store,
            out=paths.trained(config.model.name),
            progress=paths.progress(config.model.name),
            name=f"{config.model.name}-{store.meta.dataset}",
        )
    )
    if rows is not None:
        metrics.write_csv(rows, paths.CURVES)
