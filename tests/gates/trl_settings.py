"""Settings that runs beside TRL's trainers always have, on both sides."""

from typing import Any

OPTIMIZER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "clip_grad": 1.0}
OURS = [
    *(f"optim.{key}={value}" for key, value in OPTIMIZER.items()),
    "optim.weight_decay=0",
    "optim.schedule=constant",
    "optim.warmup_steps=0",
    "trainer.eval_every=null",
    "trainer.progress=none",
    "logger.tensorboard=false",
    "checkpoint.every=null",
    "checkpoint.save_last=false",
]
THEIRS: dict[str, Any] = {
    "learning_rate": OPTIMIZER["lr"],
    "adam_beta1": OPTIMIZER["beta1"],
    "adam_beta2": OPTIMIZER["beta2"],
    "adam_epsilon": OPTIMIZER["eps"],
    "max_grad_norm": OPTIMIZER["clip_grad"],
    "optim": "adamw_torch",
    "weight_decay": 0.0,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}
