import csv
import math
import sys
from pathlib import Path

import pytest
from lightning.pytorch.utilities import rank_zero_only

from megarl.callbacks.step_axis import StepAxis
from megarl.config.sections.logger import LoggerConfig, MlflowConfig, WandbConfig
from megarl.errors import UnavailableError
from megarl.run.csv_logger import MetricsFile
from megarl.run.loggers import build_loggers
from tests.callbacks.tiny import SaveAt, Tiny, train
from tests.refusals import refused

RESOLVED = {"seed": 7, "optim": {"lr": 0.125}, "data": {"train": ["a.jsonl"]}}


def only(**chosen: object) -> LoggerConfig:
    return LoggerConfig(**{"tensorboard": False, "csv": False, **chosen})


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


# --- metrics.csv


def test_csv_has_one_row_per_step_with_training_and_evaluation(tmp_path):
    loggers = build_loggers(only(csv=True), tmp_path, "r", RESOLVED)
    train(Tiny([4.0, 3.0, 2.0, 1.0], evals=[9.0]), [StepAxis()], steps=4, log_every=2, eval_every=4, logger=loggers)
    table = rows(tmp_path / "metrics.csv")
    assert [(row["step"], row["train/loss"], row.get("eval/loss")) for row in table] == [
        ("2", "3.0", None),
        ("4", "1.0", "9.0"),
    ]


def test_csv_of_a_resumed_run_continues_and_replaces_what_is_repeated(tmp_path):
    def loggers():
        return build_loggers(only(csv=True), tmp_path, "r", RESOLVED)

    checkpoint = tmp_path / "two.ckpt"
    train(Tiny([4.0, 3.0, 2.0]), [StepAxis(), SaveAt(2, checkpoint)], steps=3, logger=loggers())
    train(Tiny([0.0, 0.0, 2.5, 1.0]), [StepAxis()], steps=4, logger=loggers(), resume=checkpoint)
    table = rows(tmp_path / "metrics.csv")
    assert [(row["step"], row["train/loss"]) for row in table] == [
        ("1", "4.0"), ("2", "3.0"), ("3", "2.5"), ("4", "1.0"),
    ]  # fmt: skip


def test_csv_row_is_on_disk_at_once_and_new_columns_keep_old_rows(tmp_path):
    file = MetricsFile(tmp_path / "metrics.csv")
    file.log_metrics({"b": 0.1}, step=1)
    assert rows(file.path) == [{"step": "1", "b": "0.1"}]
    file.log_metrics({"b": 0.2, "a": math.nan}, step=2)
    file.log_metrics({"c": 1e-9}, step=2)
    file.log_metrics({"b": 0.3}, step=5)
    assert file.path.read_text() == "step,a,b,c\n1,,0.1,\n2,nan,0.2,1e-09\n5,,0.3,\n"


def test_csv_rows_stay_in_order_when_an_earlier_step_is_logged(tmp_path):
    file = MetricsFile(tmp_path / "metrics.csv")
    for step in (10, 20, 30):
        file.log_metrics({"a": step / 10}, step=step)
    again = MetricsFile(tmp_path / "metrics.csv")
    again.log_metrics({"a": 9.0}, step=20)
    again.log_metrics({"a": 8.0}, step=25)
    again.log_metrics({"a": 7.0}, step=30)
    assert [(row["step"], row["a"]) for row in rows(file.path)] == [
        ("10", "1.0"), ("20", "9.0"), ("25", "8.0"), ("30", "7.0"),
    ]  # fmt: skip


def test_csv_line_cut_off_by_a_crash_is_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,a\n1,0.5\n2,0.")
    MetricsFile(path).log_metrics({"a": 0.25}, step=3)
    assert path.read_text() == "step,a\n1,0.5\n3,0.25\n"


def test_csv_appends_without_reading_the_table_again(tmp_path, monkeypatch):
    file = MetricsFile(tmp_path / "metrics.csv")
    file.log_metrics({"a": 1.0}, step=1)
    monkeypatch.setattr(file, "_read", lambda: pytest.fail("read again"))
    file.log_metrics({"a": 2.0}, step=2)
    file.log_metrics({"a": 3.0}, step=2)
    file.log_metrics({"a": 4.0}, step=3)
    assert [row["a"] for row in rows(file.path)] == ["1.0", "3.0", "4.0"]


# --- the others


def test_tensorboard_gets_metrics_at_their_steps_and_the_configuration(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = build_loggers(only(tensorboard=True), tmp_path, "r", RESOLVED)
    train(Tiny([4.0, 3.0], evals=[9.0]), [StepAxis()], steps=2, eval_every=2, logger=loggers)
    loggers[0].finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 4.0), (2, 3.0)]
    assert [(e.step, e.value) for e in events.Scalars("eval/loss")] == [(2, 9.0)]
    assert "lr: 0.125" in (tmp_path / "tensorboard" / "hparams.yaml").read_text()


def test_missing_tensorboard_is_a_warning_since_it_is_on_by_default(tmp_path, monkeypatch, caplog):
    def missing(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("tensorboard")

    monkeypatch.setattr("megarl.run.loggers.TensorBoardLogger", missing)
    assert build_loggers(only(tensorboard=True), tmp_path, "r", RESOLVED) == []
    assert "pip install 'megarl[log]'" in caplog.text


def test_wandb_offline_run_continues_under_the_same_id(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")  # Lightning sets it; set here, it is put back afterwards
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    config = only(wandb=WandbConfig("p", "offline"))
    try:
        (first,) = build_loggers(config, tmp_path, "name", RESOLVED)
        first.log_metrics({"train/loss": 1.0}, step=3)
        assert first.experiment.name == "name"
        assert first.experiment.config["optim"] == {"lr": 0.125}
        first_id = first.experiment.id
        wandb.finish()
        (second,) = build_loggers(config, tmp_path, "name", RESOLVED)
        assert second.experiment.id == first_id == (tmp_path / "wandb-id.txt").read_text().strip()
    finally:
        wandb.finish()
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_mlflow_run_continues_and_keeps_its_first_parameters(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # put back afterwards
    (first,) = build_loggers(only(mlflow=MlflowConfig()), tmp_path, "name", RESOLVED)
    first.log_metrics({"train/loss": 2.0}, step=3)
    (second,) = build_loggers(only(mlflow=MlflowConfig()), tmp_path, "name", {**RESOLVED, "seed": 8})
    second.log_metrics({"train/loss": 1.0}, step=4)
    client = MlflowClient(f"file:{tmp_path}/mlruns")
    run = client.get_run((tmp_path / "mlflow-id.txt").read_text().strip())
    assert run.info.run_name == "name"
    assert (run.data.params["optim/lr"], run.data.params["seed"]) == ("0.125", "7")
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(3, 2.0), (4, 1.0)]


@pytest.mark.parametrize(("kind", "package"), [("wandb", "wandb"), ("mlflow", "mlflow")])
def test_missing_package_says_what_to_install(kind, package, tmp_path, monkeypatch):
    class Missing:
        def __init__(self, *_: object, **__: object) -> None:
            raise ModuleNotFoundError(f"No module named '{package}'")

    monkeypatch.setattr(f"megarl.run.loggers.{'WandbLogger' if kind == 'wandb' else 'MLFlowLogger'}", Missing)
    with refused(UnavailableError, key=f"logger.{kind}", names=(f"'{package}'", "megarl[log]")):
        build_loggers(only(**{kind: {"wandb": WandbConfig, "mlflow": MlflowConfig}[kind]()}), tmp_path, "r", RESOLVED)


def test_service_that_cannot_be_reached_names_the_key(tmp_path):
    pytest.importorskip("mlflow")
    with refused(UnavailableError, key="logger.mlflow", names=("logger.mlflow.uri",)):
        build_loggers(only(mlflow=MlflowConfig("nosuch://place")), tmp_path, "r", RESOLVED)


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    monkeypatch.setenv("WANDB_MODE", "offline")  # put back afterwards
    everything = LoggerConfig(wandb=WandbConfig(mode="offline"))
    for entry in build_loggers(everything, tmp_path, "r", RESOLVED):
        entry.log_metrics({"a": 1.0}, step=1)
        entry.save()
        entry.finalize("success")
    assert list(tmp_path.rglob("*")) == []


def test_services_are_imported_only_when_asked_for(tmp_path, monkeypatch):
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)  # an import would fail
    assert len(build_loggers(LoggerConfig(), tmp_path, "r", RESOLVED)) == 2
