"""What a run says of its chat template, each thing once."""

from __future__ import annotations

from collections.abc import Sequence

from megarl.chat.templates import DATE
from megarl.chat.turns import Layout, Turns
from megarl.logging import get_logger, info_once, warn_once

log = get_logger(__name__)


def tell(turns: Turns, stop_ids: Sequence[int]) -> None:
    """How a template marks and ends an answer, where a user would not expect it.

    Args:
        stop_ids: tokens at which a response ends, EOS first.
    """
    template, facts = turns.template, []
    if template.marked:
        facts.append("its {% generation %} marks say what is trained on")
    if "strftime_now" in template.source:
        facts.append(f"today is {DATE:%d %b %Y} in it, so that tokens do not depend on the day")
    if len(stop_ids) > 1:
        facts.append(
            f"an answer ends with {turns.marker!r} (token {stop_ids[-1]}), which is not the tokenizer's EOS "
            f"(token {stop_ids[0]}), and generation stops at both"
        )
    if facts:
        info_once(log, "chat template: " + "; ".join(facts))
    if turns.ending is not None:
        _warn_of_endings(turns, len(stop_ids) > 1)


def note_layout(layout: Layout) -> Layout:
    """A layout, after telling of what the template does to such conversations."""
    if layout.changed:
        info_once(
            log,
            "chat template: it writes a turn differently once others follow; every answer, and what comes before it, "
            "is kept as when it was generated (docs/data.md, Chats)",
        )
    if layout.shortened is not None:
        warn_once(
            log,
            f"chat template: it leaves out a part of what the assistant says (first met in turn {layout.shortened}), "
            "such as reasoning, so that part is not trained on; to keep it, set data.chat_template",
        )
    return layout


def _warn_of_endings(turns: Turns, has_token: bool) -> None:
    marker, eos = turns.marker, str(turns.template.variables.get("eos_token") or "")
    if not marker:
        warn_once(
            log,
            "chat template: it writes no token that ends an answer, so the model does not learn where to stop; set "
            "data.chat_template to one with {{ eos_token }} after the assistant's content",
        )
    elif not has_token and not (eos and marker.endswith(eos)):
        warn_once(
            log,
            f"chat template: an answer ends with {marker!r}, which is not one token of this tokenizer, so generation "
            f"does not stop there by itself; set rollout.stop=[{marker.strip()!r}], or data.chat_template to one with "
            "{{ eos_token }} there",
        )
    if not turns.template.marked:
        return
    if not turns.marks_beginning():
        warn_once(
            log,
            "chat template: what it writes where add_generation_prompt is set is not how it begins an answer "
            "elsewhere, so the model generates from another prompt than it is trained on; make the two the same",
        )
    if marker and not turns.marks_ending():
        warn_once(
            log,
            f"chat template: {marker!r}, which ends an answer, is not within {{% generation %}}, so the model does not "
            "learn where to stop; put {% endgeneration %} after it",
        )
