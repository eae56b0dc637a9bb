"""Which parameters have Kronecker factors, and how the gradients of rows by the others are had."""

from __future__ import annotations

import pandas as pd

from upweight.curvature.capture import find_capture
from upweight.risk import EmpiricalRisk

__all__ = ["coverage"]


def coverage(risk: EmpiricalRisk) -> pd.DataFrame:
    """How the parameters of a model are dealt with, module by module, before any work is done.

    A few rows are run through the model; there is no pass over all of them.

    Parameters
    ----------
    risk
        The rows, model and loss.

    Returns
    -------
    pandas.DataFrame
        A line for each module, or for a parameter that is dealt with apart from its module, with

        - ``module``, ``type``: its name and class;
        - ``parameters``: how many of θ are in it;
        - ``how``: ``"kronecker"``, with factors and gradients from what goes in and out of the
          layer; ``"hooks"``, with gradients from that and no factors; ``"autodiff"``, with
          gradients row by row, which is slow for many parameters;
        - ``why``: the reason in words.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    >>> risk = EmpiricalRisk(model, torch.nn.MSELoss(), (torch.ones(4, 2), torch.ones(4, 3)))
    >>> coverage(risk)[["module", "type", "parameters", "how"]]
      module       type  parameters        how
    0      0     Linear           9  kronecker
    1      1  LayerNorm           6      hooks
    """
    capture, reasons = find_capture(risk)
    sizes = dict(zip(risk.model.names, risk.model.sizes, strict=True))
    lines: dict[str, dict[str, object]] = {}  # by first parameter
    for site in (*capture.sites, *capture.rests):
        names = [name for name in site.names if name is not None]
        factored = site in capture.sites
        why = reasons.get(names[0], "its inputs and the derivatives by its outputs give factors")
        kind = " and ".join(dict.fromkeys(type(module).__name__ for module in site.modules))
        lines[names[0]] = _line(site.name, kind, site.size, factored and "kronecker", why)
    known = {n for site in (*capture.sites, *capture.rests) for n in site.names}
    owned: dict[str, list[str]] = {}
    for name in sizes:
        if name not in known:
            owned.setdefault(name.rpartition(".")[0], []).append(name)
    for owner, names in owned.items():
        kind = type(risk.model.model.get_submodule(owner)).__name__
        why = "; ".join(dict.fromkeys(reasons[name] for name in names))
        size = sum(sizes[name] for name in names)
        lines[names[0]] = _line(owner or kind, kind, size, "autodiff", why)
    ordered = [lines[name] for name in sizes if name in lines]
    return pd.DataFrame(ordered, columns=["module", "type", "parameters", "how", "why"])


def _line(module: str, kind: str, parameters: int, how: str | bool, why: str) -> dict[str, object]:
    return {
        "module": module,
        "type": kind,
        "parameters": parameters,
        "how": how or "hooks",
        "why": why,
    }
