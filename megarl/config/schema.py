"""The typed configuration tree: a dataclass per section, a documented leaf per key, a tree per entry point.

This file only declares; composition is in `compose`. Rules that join several keys are in `checks`, and each tree names
its own. Which algorithm has which tree is in `algorithms`.
"""

# ruff: noqa: RUF009 - `leaf` and `section` return dataclass fields

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megarl.config import checks
from megarl.config.leaf import leaf, optional_section, section
from megarl.config.offline import GuidedEvalConfig, GuidedRolloutConfig, ILQLSettings, OfflineDataConfig
from megarl.config.rl import (
    A_YEAR_S,
    CLONE,
    OPTIONS,
    SOURCES,
    TOO_LONG,
    CloneConfig,
    CriticConfig,
    EvalConfig,
    MetricConfig,
    PPOSettings,
    PromptDataConfig,
    RewardConfig,
    RFTSettings,
    RolloutConfig,
)


@dataclass
class RunConfig:
    """Where a run lives and whether it continues an earlier one."""

    dir: str | None = leaf(
        None,
        "folder of this run: logs and checkpoints (null: runs/NAME; a multirun adds the job number)",
    )
    name: str | None = leaf(None, "name of this run (null: the entry and a timestamp)")
    resume: str = leaf(
        "auto",
        "auto: continue from the run folder's newest checkpoint; never: start anew; or a checkpoint folder",
    )


@dataclass
class ModelConfig:
    """Shape of the transformer, or the folder it is loaded from."""

    path: str | None = leaf(
        None,
        "pretrained model to load: Hugging Face folder or hub name, or megarl checkpoint; it also gives the shape keys "
        "below, and the tokenizer where that is at its default (null: random weights in the shape below)",
    )
    num_layers: int = leaf(4, "transformer layers", at_least=1, at_most=10_000)
    hidden_size: int = leaf(128, "width of the residual stream", at_least=1, at_most=2**24)
    num_heads: int = leaf(4, "attention heads", at_least=1, at_most=2**20)
    num_kv_heads: int | None = leaf(
        None, "key/value heads of grouped-query attention (null: num_heads)", at_least=1, at_most=2**20
    )
    head_dim: int | None = leaf(None, "width of one head (null: hidden_size / num_heads)", at_least=1, at_most=2**20)
    ffn_size: int | None = leaf(None, "inner width of the MLP (null: 4 * hidden_size)", at_least=1, at_most=2**26)
    max_positions: int = leaf(256, "context length: the most tokens a sequence may have", at_least=1, at_most=2**31 - 1)
    vocab_size: int | None = leaf(
        None, "entries of the embedding before padding (null: the tokenizer's size)", at_least=1, at_most=2**31 - 1
    )
    position: str = leaf("rope", "how positions enter the model", ("learned", "rope", "none"))
    position_offset: int = leaf(
        0, "added to every position before a learned embedding is looked up", at_least=0, at_most=2**31 - 1
    )
    rope_base: float = leaf(10000.0, "base of the rotary frequencies", above=0)
    rope_percent: float = leaf(1.0, "share of each head's width that is rotated", above=0, at_most=1)
    rope_interleaved: bool = leaf(
        False, "rotate neighbouring pairs (GPT-J) instead of the two halves (GPT-NeoX, Llama)"
    )
    rope_scaling: str = leaf(
        "none",
        "how rotary frequencies are stretched for longer contexts",
        ("none", "linear", "llama3", "yarn"),
    )
    rope_factor: float = leaf(1.0, "stretch of rope_scaling", at_least=1)
    rope_low_freq_factor: float = leaf(
        1.0, "llama3: frequencies below this many turns per original context are stretched fully", above=0
    )
    rope_high_freq_factor: float = leaf(
        4.0, "llama3: frequencies above this many turns per original context are left alone", above=0
    )
    rope_original_positions: int | None = leaf(
        None, "context length before stretching (llama3 and yarn need it)", at_least=1, at_most=2**31 - 1
    )
    norm: str = leaf("rmsnorm", "normalisation layer", ("layernorm", "rmsnorm"))
    norm_eps: float = leaf(1e-5, "added to the variance in the norm", above=0)
    activation: str = leaf("swiglu", "non-linearity of the MLP", ("gelu", "gelu_tanh", "relu", "swiglu"))
    tie_embeddings: bool = leaf(False, "use the input embedding as output layer too")
    qk_norm: bool = leaf(False, "normalise queries and keys per head")
    qkv_bias: bool = leaf(False, "bias in the query/key/value projection")
    out_bias: bool = leaf(False, "bias in the attention output projection")
    mlp_bias: bool = leaf(False, "bias in the MLP")
    lm_head_bias: bool = leaf(False, "bias in the output layer")
    parallel_residual: str = leaf(
        "none",
        "run attention and MLP side by side, from one shared norm (GPT-J) or a norm each (GPT-NeoX)",
        ("none", "one_norm", "two_norms"),
    )
    sliding_window: int | None = leaf(
        None,
        "each token attends to this many latest tokens, itself included (null: all)",
        at_least=1,
        at_most=2**31 - 1,
    )
    dropout: float = leaf(0.0, "dropout of hidden states and attention", at_least=0, below=1)
    init_std: float = leaf(0.02, "standard deviation of random initial weights", above=0)
    num_layers_unfrozen: int = leaf(
        -1, "train only the last N layers, the final norm and the heads (-1: everything)", at_least=-1
    )


@dataclass
class TokenizerConfig:
    """How text becomes token ids."""

    kind: str = leaf("bytes", "kind of tokenizer", ("bytes", "characters", "sentencepiece", "huggingface"))
    path: str | None = leaf(
        None, "characters: the alphabet; sentencepiece: model file; huggingface: folder or hub name (bytes: unused)"
    )


@dataclass
class ParallelConfig:
    """The grid of processes one model is spread over; data parallelism is what remains of the world."""

    tp: int = leaf(1, "tensor-parallel size: each layer is split over this many processes", at_least=1, at_most=2**20)
    pp: int = leaf(1, "pipeline-parallel size: the layers are split over this many stages", at_least=1, at_most=2**20)
    cp: int = leaf(
        1, "context-parallel size: each sequence is split over this many processes", at_least=1, at_most=2**20
    )
    vpp: int | None = leaf(
        None, "virtual pipeline stages per process, interleaved schedule (null: none)", at_least=1, at_most=2**20
    )
    sequence_parallel: bool = leaf(
        False, "split activations between the tensor-parallel regions over time (no effect when tp is 1)"
    )
    recompute: str = leaf(
        "none", "activations recomputed in the backward pass to save memory", ("none", "selective", "full")
    )
    timeout_s: int = leaf(
        600, "seconds a process waits for the others before it gives up", at_least=1, at_most=A_YEAR_S
    )
    kernels: str = leaf(
        "auto",
        "layer kernels: the fastest that can be imported, or one kind by name",
        ("auto", "torch", "te", "apex"),
    )
    offload: bool = leaf(
        False,
        "move the optimizer's state, the gradients, and models that only wait to host memory while responses are "
        "generated and evaluated; they return when they are used (no effect on runs that generate nothing)",
    )


@dataclass
class DataConfig:
    """Which records are read and how they become batches."""

    train: list[str] = leaf([], SOURCES.format("records to train on"))
    eval: list[str] = leaf(
        [],
        "records to evaluate on, likewise (empty: no evaluation). The default is the demo set, and only if data.train "
        "is the demo set",
    )
    options: dict[str, Any] = leaf({}, OPTIONS)
    format: str = leaf("auto", "shape of a record (auto: told by its keys)", ("auto", "text", "completion", "chat"))
    text_key: str = leaf("text", "key of the text in a text record")
    prompt_key: str = leaf("prompt", "key of the prompt in a completion record")
    completion_key: str = leaf("completion", "key of the completion in a completion record")
    messages_key: str = leaf("messages", "key of the list of messages in a chat record")
    chat_template: str | None = leaf(
        None, "Jinja template for chats (null: the tokenizer's own, else the built-in one)"
    )
    train_split: str = leaf("train", "split of a hub data set that is trained on")
    eval_split: str = leaf("validation", "split of a hub data set that is evaluated on")
    seq_length: int = leaf(128, "maximum number of tokens per training sequence", at_least=2, at_most=2**31 - 1)
    too_long: str = leaf(
        "truncate", "what happens to records longer than seq_length: cut at the end, left out or an error", TOO_LONG
    )
    loss_on: str = leaf("completion", "tokens that are trained on", ("completion", "all"))
    pack: bool = leaf(False, "put several short records into one sequence (they never attend to each other)")
    group_by_length: bool = leaf(False, "put records of similar length into one batch to save padding")
    shuffle: bool = leaf(True, "draw records in a new seeded order every epoch")
    eval_limit: int | None = leaf(None, "evaluate on the first N records only (null: all)", at_least=1)


@dataclass
class OptimConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = leaf(1e-3, "peak learning rate", at_least=0)
    min_lr_ratio: float = leaf(0.1, "the schedule ends at this share of lr", at_least=0, at_most=1)
    warmup_steps: int = leaf(10, "steps of linear warm-up from 0", at_least=0)
    schedule: str = leaf("cosine", "decay of the learning rate after warm-up", ("constant", "linear", "cosine"))
    weight_decay: float = leaf(0.01, "decoupled weight decay (norms and biases are exempt)", at_least=0)
    beta1: float = leaf(0.9, "decay of Adam's first moment", at_least=0, below=1)
    beta2: float = leaf(0.95, "decay of Adam's second moment", at_least=0, below=1)
    eps: float = leaf(1e-8, "added to the denominator in Adam", above=0)
    clip_grad: float = leaf(1.0, "largest norm of the whole gradient (0: no clipping)", at_least=0)


@dataclass
class TrainerConfig:
    """How long, how much at once, on what, and how often things are looked at."""

    devices: int | str = leaf(1, 'processes per node when megarl starts them itself; "auto": all GPUs, or 1 on CPU')
    num_nodes: int = leaf(1, "machines", at_least=1, at_most=2**20)
    accelerator: str = leaf("auto", "kind of device", ("auto", "cpu", "gpu"))
    precision: str = leaf("fp32", "precision of weights and activations in the model", ("fp32", "bf16"))
    max_steps: int = leaf(200, "optimizer steps", at_least=1)
    global_batch_size: int = leaf(16, "sequences per optimizer step, over all processes", at_least=1, at_most=2**24)
    micro_batch_size: int = leaf(8, "sequences per forward pass of one model replica", at_least=1, at_most=2**24)
    eval_every: int | None = leaf(50, "steps between evaluations (null: never)", at_least=1)
    eval_batch_size: int = leaf(
        16, "sequences per forward pass of one replica in evaluation", at_least=1, at_most=2**24
    )
    log_every: int = leaf(10, "steps between logged metrics", at_least=1)
    max_time: str | None = leaf(None, 'stop cleanly after this wall time, "HH:MM:SS" (null: no limit)')
    peak_tflops: float | None = leaf(
        None,
        "stated peak TFLOP/s of one device, from which model FLOPs utilisation is logged (null: it is not)",
        above=0,
    )
    progress: str = leaf("auto", "progress display (auto: rich on a terminal)", ("auto", "rich", "plain", "none"))
    exp_manager: str = leaf(
        "none",
        "who else prepares the Trainer: NeMo's exp_manager (spell it trainer/exp_manager=nemo)",
        ("none", "nemo"),
    )
    exp_manager_options: dict[str, Any] = leaf(
        {}, "keys of NeMo's exp_manager; checkpoints, resuming and stopping stay megarl's own"
    )


@dataclass
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every: int | None = leaf(50, "steps between checkpoints (null: only at the end)", at_least=1)
    keep_last: int = leaf(2, "newest checkpoints that are kept", at_least=1)
    keep_best: int = leaf(1, "best checkpoints, by metric, that are kept besides", at_least=0)
    metric: str = leaf("eval/loss", "logged metric that says which checkpoint is best")
    mode: str = leaf("min", "whether a smaller or a larger metric is better", ("min", "max"))
    async_save: bool = leaf(False, "write checkpoints in the background while training goes on")
    save_last: bool = leaf(True, "write a checkpoint when training ends")


@dataclass
class ExportConfig:
    """What is left behind for others when training ends."""

    hf: str | None = leaf(None, "new folder for the trained model as Hugging Face's transformers reads it (null: none)")


@dataclass
class WandbConfig:
    """How Weights & Biases is reported to."""

    project: str = leaf("megarl", "Weights & Biases project")
    mode: str = leaf("online", "Weights & Biases mode", ("online", "offline"))


@dataclass
class MlflowConfig:
    """How MLflow is reported to."""

    uri: str | None = leaf(None, "MLflow tracking server or folder (null: mlruns/ in the run folder)")


@dataclass
class LoggerConfig:
    """Where metrics go besides the console."""

    tensorboard: bool = leaf(True, "write TensorBoard event files")
    csv: bool = leaf(True, "write metrics.csv")
    wandb: WandbConfig | None = optional_section(WandbConfig, "log to Weights & Biases")
    mlflow: MlflowConfig | None = optional_section(MlflowConfig, "log to MLflow")


@dataclass
class SFTConfig:
    """Everything `python -m megarl.train_sft` can be told."""

    rules = checks.RULES

    seed: int = leaf(1, "seed of weights, data order and dropout", at_least=0)
    debug: bool = leaf(False, "show tracebacks and log in detail")
    run: RunConfig = section(RunConfig)
    model: ModelConfig = section(ModelConfig)
    tokenizer: TokenizerConfig = section(TokenizerConfig)
    parallel: ParallelConfig = section(ParallelConfig)
    data: DataConfig = section(DataConfig)
    optim: OptimConfig = section(OptimConfig)
    trainer: TrainerConfig = section(TrainerConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    export: ExportConfig = section(ExportConfig)
    logger: LoggerConfig = section(LoggerConfig)


@dataclass
class PhaseTrainerConfig:
    """How long, how much at once, on what, and how often things are looked at; a phase generates, then trains."""

    devices: int | str = leaf(1, 'processes per node when megarl starts them itself; "auto": all GPUs, or 1 on CPU')
    num_nodes: int = leaf(1, "machines", at_least=1, at_most=2**20)
    accelerator: str = leaf("auto", "kind of device", ("auto", "cpu", "gpu"))
    precision: str = leaf("fp32", "precision of weights and activations in the model", ("fp32", "bf16"))
    max_phases: int = leaf(100, "phases", at_least=1)
    global_batch_size: int = leaf(64, "sequences per optimizer step, over all processes", at_least=1, at_most=2**24)
    micro_batch_size: int = leaf(8, "sequences per forward pass of one model replica", at_least=1, at_most=2**24)
    eval_every: int | None = leaf(5, "phases between evaluations (null: never)", at_least=1)
    log_every: int = leaf(1, "phases between logged metrics", at_least=1)
    max_time: str | None = leaf(None, 'stop cleanly after this wall time, "HH:MM:SS" (null: no limit)')
    peak_tflops: float | None = leaf(
        None,
        "stated peak TFLOP/s of one device, from which model FLOPs utilisation is logged (null: it is not)",
        above=0,
    )
    progress: str = leaf("auto", "progress display (auto: rich on a terminal)", ("auto", "rich", "plain", "none"))
    exp_manager: str = leaf(
        "none",
        "who else prepares the Trainer: NeMo's exp_manager (spell it trainer/exp_manager=nemo)",
        ("none", "nemo"),
    )
    exp_manager_options: dict[str, Any] = leaf(
        {}, "keys of NeMo's exp_manager; checkpoints, resuming and stopping stay megarl's own"
    )


@dataclass
class PPOConfig:
    """Everything `python -m megarl.train_ppo` can be told."""

    rules = checks.PHASE_RULES

    seed: int = leaf(1, "seed of weights, prompt order, draws and dropout", at_least=0)
    debug: bool = leaf(False, "show tracebacks and log in detail")
    run: RunConfig = section(RunConfig)
    model: ModelConfig = section(ModelConfig)
    tokenizer: TokenizerConfig = section(TokenizerConfig)
    parallel: ParallelConfig = section(ParallelConfig)
    data: PromptDataConfig = section(PromptDataConfig)
    rollout: RolloutConfig = section(RolloutConfig)
    reward: RewardConfig = section(RewardConfig)
    metric: MetricConfig = section(MetricConfig)
    eval: EvalConfig = section(EvalConfig)
    clone: CloneConfig | None = optional_section(CloneConfig, CLONE, needs="data")
    critic: CriticConfig = section(CriticConfig)
    ppo: PPOSettings = section(PPOSettings)
    optim: OptimConfig = section(OptimConfig)
    trainer: PhaseTrainerConfig = section(PhaseTrainerConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    export: ExportConfig = section(ExportConfig)
    logger: LoggerConfig = section(LoggerConfig)


@dataclass
class RFTConfig:
    """Everything `python -m megarl.train_rft` can be told."""

    rules = checks.REJECTION_RULES

    seed: int = leaf(1, "seed of weights, prompt order, draws and dropout", at_least=0)
    debug: bool = leaf(False, "show tracebacks and log in detail")
    run: RunConfig = section(RunConfig)
    model: ModelConfig = section(ModelConfig)
    tokenizer: TokenizerConfig = section(TokenizerConfig)
    parallel: ParallelConfig = section(ParallelConfig)
    data: PromptDataConfig = section(PromptDataConfig)
    rollout: RolloutConfig = section(RolloutConfig)
    reward: RewardConfig = section(RewardConfig)
    metric: MetricConfig = section(MetricConfig)
    eval: EvalConfig = section(EvalConfig)
    clone: CloneConfig | None = optional_section(CloneConfig, CLONE, needs="data")
    rft: RFTSettings = section(RFTSettings)
    optim: OptimConfig = section(OptimConfig)
    trainer: PhaseTrainerConfig = section(PhaseTrainerConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    export: ExportConfig = section(ExportConfig)
    logger: LoggerConfig = section(LoggerConfig)


@dataclass
class ILQLConfig:
    """Everything `python -m megarl.train_ilql` can be told."""

    rules = checks.OFFLINE_RULES

    seed: int = leaf(1, "seed of weights, sample order, draws and dropout", at_least=0)
    debug: bool = leaf(False, "show tracebacks and log in detail")
    run: RunConfig = section(RunConfig)
    model: ModelConfig = section(ModelConfig)
    tokenizer: TokenizerConfig = section(TokenizerConfig)
    parallel: ParallelConfig = section(ParallelConfig)
    data: OfflineDataConfig = section(OfflineDataConfig)
    ilql: ILQLSettings = section(ILQLSettings)
    rollout: GuidedRolloutConfig = section(GuidedRolloutConfig)
    reward: RewardConfig = section(RewardConfig)
    metric: MetricConfig = section(MetricConfig)
    eval: GuidedEvalConfig = section(GuidedEvalConfig)
    optim: OptimConfig = section(OptimConfig)
    trainer: TrainerConfig = section(TrainerConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    export: ExportConfig = section(ExportConfig)
    logger: LoggerConfig = section(LoggerConfig)


@dataclass
class DevicesConfig:
    """What an entry point that does not train runs on; the same keys as in training."""

    devices: int | str = leaf(1, 'processes per node when megarl starts them itself; "auto": all GPUs, or 1 on CPU')
    num_nodes: int = leaf(1, "machines", at_least=1, at_most=2**20)
    accelerator: str = leaf("auto", "kind of device", ("auto", "cpu", "gpu"))
    precision: str = leaf("fp32", "precision of weights and activations in the model", ("fp32", "bf16"))
    progress: str = leaf("auto", "progress display (auto: rich on a terminal)", ("auto", "rich", "plain", "none"))


@dataclass
class GenerateConfig:
    """Everything `python -m megarl.generate` can be told."""

    rules = checks.GENERATION_RULES

    seed: int = leaf(1, "seed of random weights and of the draws", at_least=0)
    debug: bool = leaf(False, "show tracebacks and log in detail")
    prompts: str | None = leaf(None, "prompts: a .jsonl, .json, .parquet or .txt file, or the text of one prompt")
    prompt_key: str = leaf("prompt", "key of the prompt in a record")
    messages_key: str = leaf("messages", "key of the list of messages, in records that are conversations")
    chat_template: str | None = leaf(
        None, "Jinja template for chats (null: the tokenizer's own, else the built-in one)"
    )
    out: str | None = leaf(None, "file that the responses are written to as they are done (null: standard output)")
    chat: bool = leaf(False, "talk to the model in the terminal (also: --chat)")
    system: str | None = leaf(None, "system message that opens a chat (null: none)")
    model: ModelConfig = section(ModelConfig)
    tokenizer: TokenizerConfig = section(TokenizerConfig)
    parallel: ParallelConfig = section(ParallelConfig)
    rollout: GuidedRolloutConfig = section(GuidedRolloutConfig)
    trainer: DevicesConfig = section(DevicesConfig)
