"""report.html: the page of a run, written when the run ends."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from megarl.errors import one_line
from megarl.logging import get_logger
from megarl.report.write import FILE, write_report

logger = get_logger(__name__)


class Report(Callback):
    """Writes `report.html` at the end of a run, however it ends. It follows `Summary`, whose file it reads.

    A report that cannot be made is a line in the log and nothing else.
    """

    def __init__(self, run_folder: Path) -> None:
        self.folder = run_folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report of a run that ended or stopped."""
        self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the report of a run that failed."""
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or not (self.folder / "metrics.csv").is_file():
            return
        path = self.folder / FILE
        try:
            write_report([self.folder], path, "report")
        except Exception as problem:  # whatever is wrong with the page, the run is done
            logger.warning("%s is not written: %s", path, one_line(problem))
        else:
            logger.info("report: %s", path)
