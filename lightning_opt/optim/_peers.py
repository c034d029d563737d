"""Checkpoints of the same method in other libraries."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

State = dict[str, Any]


def from_peer(
    optimizer: type, state_dict: dict[str, Any], renamed: dict[str, str], convert: Callable[[State, State], State]
) -> dict[str, Any]:
    """Turn another library's state dict into one that ``load_state_dict`` of our class takes.

    Args:
        optimizer: Our class; options that it does not have are left out.
        state_dict: The other library's; it is not changed.
        renamed: Its names of options to ours.
        convert: ``(state, group)`` of a parameter to our state, without ``step``, which is found in either of them.
    """
    kept = set(inspect.signature(optimizer).parameters) | {"params", "param_names", "maximize"}
    groups, states = [], dict(state_dict["state"])
    for group in state_dict["param_groups"]:
        named = {renamed.get(name, name): value for name, value in group.items()}
        groups.append({name: value for name, value in named.items() if name in kept})
        for number in group["params"]:
            if number in states:
                state = states[number]
                step = torch.as_tensor(state.get("step", group.get("step")), dtype=torch.float32).reshape(())
                states[number] = {"step": step.clone(), **convert({**state, "step": step.item()}, group)}
    return {"state": states, "param_groups": groups}
