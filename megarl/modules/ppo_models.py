"""The models of PPO, and the size of its work, which runs and the plan share."""

from __future__ import annotations

from dataclasses import replace

from megarl.config.advantages import critic_kind
from megarl.config.cluster import PlanConfig
from megarl.config.ppo import PPOConfig
from megarl.experience.build_scorers import reward_roles
from megarl.models.exchange.pretrained import Sources, adapters, second_model
from megarl.models.roles import Role
from megarl.modules.clone import clones
from megarl.modules.workload import Workload, responses, reward_note


def roles(config: PPOConfig, vocab_size: int, sources: Sources) -> list[Role]:
    """Return the policy, a separate critic if there is one, and the reference if there is a KL term."""
    model, source = config.model, sources.at(config.model.path)
    critic = critic_kind(config)
    heads = ("lm", "value") if critic == "shared" else ("lm",)
    about = "trains and generates"
    own = adapters(config, sources, model)
    roles = [Role("policy", model, vocab_size, heads, optim=config.optim, source=source, about=about, **own)]
    if config.ppo.action_mask is not None:
        about = "decides which tokens may be chosen, an earlier copy of the policy"
        roles.append(Role("action_mask", model, vocab_size, source=source, about=about, follows=True, **own))
    if critic == "separate":
        roles.append(_critic(config, vocab_size, sources))
    if config.ppo.kl_coef > 0:
        copied = not own or own["adapter_source"] is not None or clones(config)
        about = "the policy's first weights, in host memory" if copied else "the policy without its adapters"
        reference = Role("reference", model, vocab_size, source=source, about=about, swaps_with="policy", **own)
        roles.append(replace(reference, has_copy=copied))
    return [*roles, *reward_roles(config, sources)]


def plan(config: PPOConfig, assumed: PlanConfig) -> Workload:
    """Return the size of a phase."""
    notes = {"critic": "a head on the policy's trunk"} if critic_kind(config) == "shared" else {}
    return Workload(
        steps=steps_per_phase(config),
        entropy=config.ppo.entropy_coef > 0 or config.ppo.adaptive_entropy is not None,
        rollouts=config.ppo.rollouts,
        rescored=True,
        notes={**notes, **reward_note(config)},
        **responses(config, assumed),
    )


def steps_per_phase(config: PPOConfig) -> int:
    """Return the optimizer steps of a phase that trains on all of its responses in every epoch."""
    return config.ppo.inner_epochs * -(-config.ppo.rollouts // config.trainer.global_batch_size)


def _critic(config: PPOConfig, vocab_size: int, sources: Sources) -> Role:
    """Return the role of a separate critic: the model at `critic.separate.path`, or a copy of the policy if that is
    null."""
    critic = config.critic.settings
    model = second_model(config, "critic.separate.path", critic.path, vocab_size, sources)
    lr = config.optim.lr if critic.lr is None else critic.lr
    return Role(
        "critic",
        model,
        model.vocab_size or vocab_size,
        heads=("value",),
        optim=replace(config.optim, lr=lr),
        lr_key="optim.lr" if critic.lr is None else "critic.separate.lr",
        source=sources.at(critic.path or config.model.path),
        about="trains, a separate model" if config.adapter is None else "trains, adapters and a head of its own",
        base="policy" if config.adapter is not None and critic.path is None and not config.parallel.offload else None,
        **adapters(config, sources, model, starts=False),
    )
