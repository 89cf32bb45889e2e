"""Engines whose memory is released between uses: nothing stays on the device, and no number changes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megarl.checkpoint import ShardedCheckpointIO, tensors
from megarl.modules.losses import count_targets, cross_entropy
from megarl.modules.sft import negative_log_likelihood
from megarl.parallel import offload
from megarl.parallel.device import CPU, GPU, DeviceSettings, assumed
from megarl.parallel.engine import Engine
from megarl.parallel.offload import DeviceMemory, HostMemory, alone
from megarl.rollout.generator import Generator, Limits
from megarl.rollout.requests import Request, Sampling
from tests.e2e.runs import assert_same_bits, final_tensors, metrics, run_ppo
from tests.gated import gated
from tests.parallel.engines import batches, small_engine
from tests.planning.allocations import recorded
from tests.worlds import Worlds

TRANSIENT = 500  # bytes of messages that a thread of gloo's still holds
BF16 = {"precision": "bf16"}
TIED = {"tie_embeddings": True}


def in_the_last_layers(name: str) -> bool:
    return not name.startswith(("embedding.", "decoder.layers.0.", "decoder.layers.1."))


# name: (processes, layout, model, options of small_engine)
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "one fp32": (1, {}, TIED, {}),
    "one bf16": (1, {}, {}, BF16),
    "DP2 fp32": (2, {}, {}, {}),
    "DP2 bf16": (2, {}, TIED, BF16),
    "TP2 fp32": (2, {"tp": 2}, TIED, {}),
    "TP2 bf16": (2, {"tp": 2}, {}, BF16),
    "PP2xVPP2 fp32": (2, {"pp": 2, "vpp": 2}, {}, {}),
    "PP2xVPP2 bf16": (2, {"pp": 2, "vpp": 2}, TIED, BF16),
    "one stage trains": (2, {"pp": 2}, {}, {**BF16, "trainable": in_the_last_layers}),
    "rmsprop": (2, {}, {}, {**BF16, "optim": {"kind": "rmsprop"}}),
    "8 bits": (2, {}, {}, {**BF16, "optim": {"kind": "adamw8bit"}}),
    "muon": (2, {"tp": 2}, {}, {"optim": {"kind": "muon"}}),
    "one layer trains": (1, {}, {}, {"trainable": lambda name: name.startswith("decoder.layers.3.")}),
}


@contextmanager
def counted() -> Iterator[Callable[[Engine], int]]:
    """Count the bytes of the storages of all tensors that were made inside, except an engine's host memory and the
    states of random generators."""
    gc.collect()
    gc.freeze()  # what is older is passed over

    def device_bytes(engine: Engine) -> int:
        gc.collect()
        held = (thing.untyped_storage() for thing in gc.get_objects() if issubclass(type(thing), Tensor))
        sizes = {storage.data_ptr(): storage.nbytes() for storage in held if storage.nbytes()}
        random = torch.get_rng_state().nbytes
        return sum(size for size in sizes.values() if size != random) - host_bytes(engine)

    try:
        yield device_bytes
    finally:
        gc.unfreeze()


def host_bytes(engine: Engine) -> int:
    """Bytes of host memory in which the engine keeps what is away, and, on a GPU, what is back."""
    memory = engine.memory
    held = [away.content for away in memory._away.values()] + list(memory._host.values())
    return sum(piece.numel() for content in held if content is not None for piece in content.pieces)


def state_of(engine: Engine) -> list[Tensor]:
    """Weights, master weights and moments of this rank, one after the other."""
    found = [parameter.detach() for _, parameter in engine.parameters()]
    optimizer: Any = engine.optimizer
    for part in optimizer.chained_optimizers if optimizer is not None else ():
        for parameter, state in () if part.is_stub_optimizer else part.optimizer.state.items():
            found += [parameter, *(value for value in state.values() if isinstance(value, Tensor))]
    return found


def counters(engine: Engine) -> int:
    """Bytes of numbers that stay: a step counter for each tensor that trains, and Megatron's own scalars."""
    optimizer: Any = engine.optimizer
    parts = [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]
    numbers = [value for value in state_of(engine) if value.dim() == 0]
    numbers += [value for part in parts for value in vars(part).values() if isinstance(value, Tensor)]
    return sum(value.nbytes for value in numbers)


def train(engine: Engine, steps: int, between: Callable[[Engine, int], None]) -> list[float]:
    """Losses of evaluations and steps, and gradient norms; `between` is called before each of these."""
    course = []
    for step in range(steps):
        between(engine, 3 * step)
        course.append(engine.evaluate(batches(engine, 9), negative_log_likelihood)["nll"])
        between(engine, 3 * step + 1)
        course.append(engine.train_step(batches(engine, step), cross_entropy, count_targets)["loss"])
        between(engine, 3 * step + 2)
        course.append(engine.apply_gradients())
    return course


def move(engine: Engine, when: int) -> None:
    """Something else each time; gradients wait for the optimizer where `when` is 2, 5 or 8."""
    if when == 3:
        engine.offload(weights=False)
    elif when == 6:
        engine.offload(optimizer=False)
    else:
        engine.offload()
        engine.offload()
    if when in (4, 5):
        engine.onload()
        engine.onload()


def compared(layout: dict[str, Any], model: dict[str, Any], options: dict[str, Any], settings: DeviceSettings) -> Any:
    """Two engines, of which one is moved out and in while it trains: both courses, and the bytes that it held."""
    with assumed(settings):
        still = small_engine(layout, model, **options)
        with counted() as device_bytes:
            moved = small_engine(layout, model, grid=still.grid, **options)
            present = device_bytes(moved)
            moved.offload()
            away = device_bytes(moved)
            moved.onload()
            back, second = device_bytes(moved), host_bytes(moved)
        small = counters(moved)
        courses = [train(engine, 3, move if engine is moved else lambda *_: None) for engine in (still, moved)]
        same = all(torch.equal(ours, theirs) for ours, theirs in zip(state_of(moved), state_of(still), strict=True))
        return *courses, same, (present, away, back), second, small


@pytest.mark.parametrize("case", gated(CASES, ["one fp32", "DP2 fp32", "TP2 bf16", "PP2xVPP2 bf16"]))
def test_moving_frees_the_device_and_changes_no_bit(case: str, worlds: Worlds) -> None:
    """What stays are single numbers, such as the optimizer's step counters."""
    world, *what = CASES[case]
    for still, moved, same, (present, away, back), second, small in worlds.run(world, compared, *what, CPU):
        assert moved == still
        assert same
        assert present > 100_000
        assert small <= away < small + TRANSIENT
        assert back == pytest.approx(present, abs=TRANSIENT)
        assert second == 0


@pytest.mark.parametrize("case", ["DP2 bf16", "PP2xVPP2 fp32"])
def test_a_gpus_settings_keep_the_host_memory_and_change_no_bit(case: str, worlds: Worlds) -> None:
    world, *what = CASES[case]
    for still, moved, same, (present, away, back), second, small in worlds.run(world, compared, *what, GPU):
        assert moved == still
        assert same
        assert small <= away < small + TRANSIENT
        assert back == pytest.approx(present, abs=TRANSIENT)
        assert second > 100_000


def without_an_optimizer() -> Any:
    with counted() as device_bytes:
        engine = small_engine({}, train=False)
        engine.offload()
        away = device_bytes(engine)
    wanted = engine.evaluate(batches(engine, 0), negative_log_likelihood)
    (model,) = engine.models
    (batch,) = batches(engine, 0, rows=2)
    output = model(batch).detach()
    engine.offload()
    kept = torch.equal(model(batch), output)
    engine.offload()
    return away, kept, wanted == engine.evaluate(batches(engine, 0), negative_log_likelihood)


def test_an_engine_that_only_evaluates_moves_and_a_model_that_somebody_kept_runs(worlds: Worlds) -> None:
    ((away, kept, same),) = worlds.run(1, without_an_optimizer)
    assert away == 0
    assert kept
    assert same


MARKER = 12_345_679
SCALARS = 64  # bytes of single numbers that a process may keep between two marks


def allocated(settings: DeviceSettings) -> list[int]:
    """Bytes allocated: by an engine that has trained, while it is away, when it is back; the same once more."""
    with assumed(settings), recorded() as seen:
        engine = small_engine({}, **BF16)

        def mark() -> None:
            gc.collect()  # what is garbage by then must not be freed between two marks
            marker = torch.empty(MARKER, dtype=torch.uint8)
            del marker

        for _ in range(2):
            train(engine, 1, lambda *_: None)
            mark()
            engine.offload()
            mark()
            engine.onload()
            mark()
    # Nothing else is of the marker's size.
    steps = zip([0, *seen.live], seen.live, strict=False)
    found = [before for before, after in steps if after - before == MARKER]
    return [*found, host_bytes(engine)]


def test_the_allocator_sees_one_copy_of_everything(worlds: Worlds) -> None:
    ((first, away, back, second, again, last, _),) = worlds.run(1, allocated, CPU)
    for others, expected in (((back, second, last), first), ((again,), away)):
        assert others == pytest.approx((expected,) * len(others), abs=SCALARS)
    assert 0 < away < 0.8 * first  # gradients are dropped, the rest is in host memory, which is counted here too
    ((first, away, back, second, again, last, host),) = worlds.run(1, allocated, GPU)
    for others, expected in (((back, second, last), first + host), ((again,), away)):
        assert others == pytest.approx((expected,) * len(others), abs=SCALARS)


def saved(engine: Engine, path: Path) -> dict[str, Tensor]:
    io = ShardedCheckpointIO()
    io.grid = engine.grid
    io.save_checkpoint({"state_dict": {"policy": engine.sharded_state_dict()}, "global_step": 1, "layout": "x"}, path)
    return tensors(path)


def restored(engine: Engine, path: Path, before_loading: Callable[[], None]) -> None:
    io = ShardedCheckpointIO()
    io.grid = engine.grid
    fill = io.load_checkpoint(path)["state_dict"]
    state = fill({"policy": engine.sharded_state_dict(loading=True)})
    before_loading()
    engine.load_state_dict(state["policy"])


def save_and_restore(
    folder: Path, layout: dict[str, Any], model: dict[str, Any], options: dict[str, Any]
) -> list[bool]:
    engine = small_engine(layout, model, **options)
    train(engine, 2, lambda *_: None)
    present = saved(engine, folder / "step-1")
    engine.offload()
    away = saved(engine, folder / "step-2")
    other = small_engine(layout, model, seed=2, grid=engine.grid, **options)
    other.offload()
    restored(other, folder / "step-2", other.offload)
    other.offload()
    same = all(torch.equal(ours, theirs) for ours, theirs in zip(state_of(other), state_of(engine), strict=True))
    courses = [train(one, 1, lambda *_: None) for one in (engine, other)]
    equal = present.keys() == away.keys() and all(torch.equal(present[key], away[key]) for key in present)
    return [equal, same, courses[0] == courses[1]]


@pytest.mark.parametrize("case", ["DP2 bf16", "PP2xVPP2 fp32"])
def test_an_engine_that_is_away_saves_and_restores(case: str, worlds: Worlds, tmp_path: Path) -> None:
    world, *what = CASES[case]
    assert worlds.run(world, save_and_restore, tmp_path, *what) == [[True] * 3] * world


VERBS: dict[str, Callable[[Engine, Engine], Any]] = {
    "trainable_copy": lambda engine, _: list(engine.trainable_copy().values()),
    "parameters": lambda engine, _: [parameter.detach().clone() for _, parameter in engine.parameters()],
    "refuse_not_finite": lambda engine, _: engine.refuse_not_finite(),
    "gradient_names": lambda engine, _: engine.gradient_names(),
    "zero_gradients": lambda engine, _: (engine.zero_gradients(), engine.gradient_names()),
    "start_from": lambda engine, other: (engine.start_from(other), state_of(engine)),
    "start_another": lambda engine, other: (other.start_from(engine), state_of(other)),
    "sharded_weights": lambda engine, _: [
        one.data.clone() for one in engine.sharded_weights()["weights"]["model0"].values() if one.data is not None
    ],
    "schedule": lambda engine, _: (engine.move_schedule_to(2), engine.learning_rate, engine.apply_gradients()),
    "with_weights": lambda engine, other: swapped(engine, other),
}


def swapped(engine: Engine, other: Engine) -> list[Any]:
    with engine.with_weights(other.trainable_copy()):
        engine.offload()
        seen = engine.evaluate(batches(engine, 1), negative_log_likelihood)["nll"]
    return [seen, *state_of(engine)]


def plain(found: Any) -> Any:
    """The same without tensors."""
    if isinstance(found, Tensor):
        return found.float().tolist()
    return [plain(one) for one in found] if isinstance(found, list | tuple) else found


def verbs_while_away() -> list[str]:
    """Names of the verbs that do not do the same while an engine is away."""
    wrong = []
    grid = small_engine({}, train=False).grid
    for name, verb in VERBS.items():
        found = []
        for is_away in (False, True):
            engine, other = (small_engine({"pp": 1}, seed=seed, grid=grid, **BF16) for seed in (1, 2))
            engine.train_step(batches(engine, 0), cross_entropy, count_targets)
            if is_away:
                engine.offload()
                other.offload()
            found.append(plain(verb(engine, other)))
        wrong += [name] if found[0] != found[1] else []
    return wrong


def test_every_verb_brings_back_what_it_needs(worlds: Worlds) -> None:
    assert worlds.run(1, verbs_while_away) == [[]]


def brought_back() -> list[list[str]]:
    """What is still away after each of these."""
    engine = small_engine({}, **BF16)
    parts = (offload.WEIGHTS, offload.GRADIENTS, offload.OPTIMIZER)
    uses: list[Callable[[], Any]] = [
        lambda: (engine.learning_rate, engine.zero_gradients(), engine.eval()),
        lambda: engine.evaluate(batches(engine, 0), negative_log_likelihood),
        lambda: engine.gradient_names(),
        lambda: engine.train_step(batches(engine, 0), cross_entropy, count_targets),
    ]
    left = []
    for use in uses:
        engine.offload()
        use()
        left.append([part for part in parts if engine.memory.is_away(part)])
    return left


def test_a_use_brings_back_no_more_than_it_needs(worlds: Worlds) -> None:
    everything = ["weights", "gradients", "optimizer"]
    assert worlds.run(1, brought_back) == [[everything, ["gradients", "optimizer"], ["optimizer"], []]]


def generated() -> Any:
    """Responses before and after the weights were away, and whether a recorded pass was made anew."""
    engine = small_engine({}, train=False)
    generator = Generator(engine, 3, seed=1, limits=Limits(4, graphs=True))
    requests = [Request(prompt, 0, (5, 6, 7), Sampling(max_new_tokens=6)) for prompt in range(4)]
    first, recording = generator.generate(requests), generator.static
    repeated = generator.generate(requests), generator.static is recording
    engine.offload()
    return first, repeated, generator.generate(requests), generator.static is recording


def test_a_recorded_pass_is_made_anew_when_the_weights_have_moved(worlds: Worlds) -> None:
    ((first, (repeated, kept), moved, stale),) = worlds.run(1, generated)
    assert [one.tokens for one in first] == [one.tokens for one in repeated] == [one.tokens for one in moved]
    assert kept
    assert not stale


def alone_on_the_device() -> Any:
    policy = small_engine({}, **BF16)
    critic = small_engine({}, grid=policy.grid, **BF16)
    parts = (offload.WEIGHTS, offload.GRADIENTS, offload.OPTIMIZER)

    def away() -> list[list[str]]:
        return [[part for part in parts if engine.memory.is_away(part)] for engine in (policy, critic)]

    with alone(policy, [policy, critic]):
        during = away()
    return during, away()


def alone_with_a_frozen_model() -> Any:
    policy = small_engine({}, **BF16)
    reward = small_engine({}, train=False, grid=policy.grid)
    found = []

    def note() -> None:
        found.append(
            [name for name, one in (("policy", policy), ("reward", reward)) if not one.memory.is_away("weights")]
        )

    with alone(policy, [policy, reward], frozen=[reward]):
        note()
        with alone(reward, [policy, reward], frozen=[reward]):  # responses of an evaluation are scored
            assert reward.models  # brings the weights back
            note()
        note()
    note()
    with alone(reward, [policy, reward], frozen=[reward]):
        assert reward.models  # brings the weights back
        note()
    note()
    return found


def test_models_that_wait_return_after_the_one_that_generates(worlds: Worlds) -> None:
    state = ["gradients", "optimizer"]
    assert worlds.run(1, alone_on_the_device) == [([state, ["weights", *state]], [state, state])]


def test_a_frozen_model_is_on_the_device_only_while_it_is_alone(worlds: Worlds) -> None:
    (found,) = worlds.run(1, alone_with_a_frozen_model)
    assert found == [["policy"], ["reward"], ["policy"], ["policy"], ["reward"], ["policy"]]


def test_content_that_spans_pieces_of_host_memory_returns_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "PIECE", 64)
    content = [torch.randint(0, 99, (size,), dtype=torch.int32) for size in (3, 50, 1, 16)]
    kept = [one.clone() for one in content]
    memory = DeviceMemory(torch.device("cpu"), {"weights": lambda: [*content, content[1][3:]]}, pins=True)
    for _ in range(2):
        memory.release("weights")
        assert [one.untyped_storage().nbytes() for one in content] == [0] * 4
        memory.need("weights")
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(content, kept, strict=True))
    assert [piece.numel() for piece in memory._host["weights"].pieces] == [64] * 4 + [280 - 4 * 64]


class FakeGPU:
    """Keeps the order of what is asked of a GPU's streams, of copies and of memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.current = "main"
        monkeypatch.setattr(torch.cuda, "Stream", lambda _: self.stream("side"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: self.stream(self.current))
        monkeypatch.setattr(torch.cuda, "stream", self.inside)
        monkeypatch.setattr(Tensor, "record_stream", lambda _, stream: self.log.append(f"used on {stream.name}"))
        copy = Tensor.copy_

        def copy_and_log(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
            self.log.append(f"copy on {self.current}{' without waiting' if non_blocking else ''}")
            return copy(target, source)

        monkeypatch.setattr(Tensor, "copy_", copy_and_log)
        original = HostMemory.__init__
        monkeypatch.setattr(
            HostMemory,
            "__init__",
            lambda memory, nbytes, pin: original(memory, nbytes, pin=self.log.append(f"pin={pin}")),
        )

    def stream(self, name: str) -> Any:
        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: self.log.append(f"{name} waits for {other.name}"),
            synchronize=lambda: self.log.append(f"host waits for {name}"),
            record_event=lambda: f"event of {name}",
            wait_event=lambda event: self.log.append(f"{name} waits for {event}"),
        )

    @contextmanager
    def inside(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before


class LoggedStorage:
    """A storage that says when its memory comes and goes."""

    def __init__(self, storage: torch.UntypedStorage, log: list[str]) -> None:
        self.storage, self.log = storage, log

    def resize_(self, nbytes: int) -> None:
        self.log.append("free" if nbytes == 0 else f"allocate on {self.current()}")
        self.storage.resize_(nbytes)

    current: Any = None


def test_the_order_of_work_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is freed after its copy; a copy to it waits for what ran before, and what uses it waits for the copy.
    Streams are stand-ins: no GPU has run this."""
    gpu = FakeGPU(monkeypatch)
    weight, kept = torch.arange(8.0), torch.arange(8.0)
    storage = LoggedStorage(weight.untyped_storage(), gpu.log)
    storage.current = lambda: gpu.current
    memory = DeviceMemory(torch.device("cuda"), {"weights": lambda: [weight]}, pins=True)
    monkeypatch.setattr(memory, "_storages_of", lambda _: [(storage, 32)])
    monkeypatch.setattr(memory, "_bytes", lambda one: torch.empty(0, dtype=torch.uint8).set_(one.storage))

    def said() -> list[str]:
        found = list(gpu.log)
        gpu.log.clear()
        return found

    memory.release("weights")
    out = ["copy on main without waiting", "host waits for main", "free"]
    assert said() == ["pin=True", *out]
    memory.restore("weights")
    back = ["allocate on main", "side waits for main", "used on side", "copy on side without waiting"]
    assert said() == back
    memory.need("weights")
    assert said() == ["main waits for event of side"]
    memory.need("weights")
    assert said() == []
    assert torch.equal(weight, kept)
    memory.release("weights")
    memory.restore("weights")
    memory.release("weights")  # not used in between
    assert said() == [*out, *back, "main waits for event of side", *out]


def test_ppo_with_offload_is_the_same_to_the_bit(worlds: Worlds, tmp_path: Path) -> None:
    settings = ["critic.kind=separate", "trainer.max_phases=2", "clone.data=[]", "checkpoint.save_last=true"]
    folders = [tmp_path / name for name in ("without", "with")]
    for folder, value in zip(folders, ("false", "true"), strict=True):
        worlds.run(1, run_ppo, folder, *settings, f"parallel.offload={value}")
    assert_same_bits(*map(final_tensors, folders))
    names = ("rollout/score", "policy/loss", "value/loss", "train/grad_norm", "train/critic_grad_norm")
    assert metrics(folders[0], *names) == metrics(folders[1], *names)
