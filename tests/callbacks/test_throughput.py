from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer

from megarl.callbacks.throughput import Throughput, peak_memory_gb
from tests.callbacks.tiny import Batches, SaveAt, Ticks, Tiny, train


class Perf(Callback):
    """Keeps what `Throughput` logged, step by step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        logged = trainer.callback_metrics.items()
        self.seen.append({name: float(value) for name, value in logged if name.startswith("perf/")})


class Delay(Callback):
    """Lets time pass in a hook."""

    def __init__(self, hook: str, ticks: Ticks, seconds: float) -> None:
        setattr(self, hook, lambda *_: ticks.pass_(seconds))


def timed(ticks: Ticks, seconds: list[float], **arguments: Any) -> Tiny:
    module = Tiny([1.0] * len(seconds), **arguments)
    module.in_step = lambda step: ticks.pass_(seconds[step])
    return module


def test_means_over_the_steps_since_the_last_logging():
    ticks, perf = Ticks(), Perf()
    train(timed(ticks, [2.0, 2.0, 4.0, 6.0]), [Throughput(now=ticks), perf], steps=4, log_every=2)
    assert perf.seen[3]["perf/step_seconds"] == 5.0
    assert perf.seen[3]["perf/tokens_per_second"] == pytest.approx(200 / 10)


def test_the_first_step_is_left_out_once_there_is_another():
    ticks, perf = Ticks(), Perf()
    train(timed(ticks, [60.0, 2.0, 4.0]), [Throughput(now=ticks), perf], steps=3, log_every=10)
    assert [seen["perf/step_seconds"] for seen in perf.seen] == [60.0, 2.0, 3.0]


def test_utilisation_is_flops_over_time_and_stated_peak():
    ticks, perf = Ticks(), Perf()
    # 3e9 operations in 2 s on one device of 0.01 TFLOP/s: 3e9 / (2 * 1e10)
    train(timed(ticks, [2.0]), [Throughput(peak_tflops=0.01, now=ticks), perf], steps=1)
    assert perf.seen[0]["perf/mfu"] == pytest.approx(0.15)


def test_no_utilisation_without_a_stated_peak():
    ticks, perf = Ticks(), Perf()
    train(timed(ticks, [2.0]), [Throughput(now=ticks), perf], steps=1)
    assert "perf/mfu" not in perf.seen[0]


def test_evaluation_is_not_step_time():
    ticks, perf = Ticks(), Perf()
    slow = Delay("on_validation_batch_start", ticks, 100.0)
    train(timed(ticks, [1.0, 1.0], evals=[1.0, 1.0]), [Throughput(now=ticks), slow, perf], steps=2, eval_every=1)
    assert ticks.time == 202.0
    assert perf.seen[1]["perf/step_seconds"] == 1.0


def test_checkpoints_are_not_step_time(tmp_path):
    ticks, perf = Ticks(), Perf()
    slow = Delay("on_save_checkpoint", ticks, 100.0)
    callbacks = [Throughput(now=ticks), perf, SaveAt(1, tmp_path / "one.ckpt"), slow]
    train(timed(ticks, [1.0, 1.0]), callbacks, steps=2)
    assert ticks.time == 102.0
    assert perf.seen[1]["perf/step_seconds"] == 1.0


def test_waiting_for_data_is_step_time():
    ticks, perf = Ticks(), Perf()
    module = timed(ticks, [1.0, 1.0])

    class Slow(Batches):
        def __iter__(self) -> Any:
            for batch in super().__iter__():
                ticks.pass_(5.0)
                yield batch

    module.train_dataloader = lambda: Slow(10)
    train(module, [Throughput(now=ticks), perf], steps=2)
    assert perf.seen[1]["perf/step_seconds"] == 6.0


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory_gb()
    held = bytearray(b"x") * int(before * 1e9 + 2e8)
    assert peak_memory_gb() >= before + 0.15, len(held)
    assert 0.05 < before < 100
