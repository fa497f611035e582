"""The recorded programs' steps, each rounded to the dtype of the inputs: shows what in their outputs is rounding.

They are the formulas of `dense_merges`, in the order in which those programs compute them.
"""

import torch


def deltas_of(base, targets):
    return torch.stack([target - base for target in targets])


def broadcast(weight, like):
    """Weights in the dtype of the deltas [J, ...], which rounds them first."""
    return torch.tensor(weight, dtype=like.dtype).view(-1, *[1] * (like.dim() - 1))


def agreeing(deltas):
    return deltas.sign() == torch.where(deltas.sum(dim=0) >= 0, 1, -1)


def summed(base, deltas, weight, elects, normalize, scale=1.0):
    weights = broadcast(weight, deltas)
    weighted = deltas * weights
    mask = agreeing(weighted) if elects else torch.ones_like(weighted, dtype=torch.bool)
    total, divisor = (weighted * mask).sum(dim=0), (weights * mask).sum(dim=0)
    if normalize:
        total = total / torch.where(divisor == 0, 1, divisor)
    return base + (total if scale == 1 else total * scale)


def task_arithmetic(base, targets, weight, normalize=False, **scale):
    return summed(base, deltas_of(base, targets), weight, False, normalize, scale.get("lambda", 1.0))


def kept(delta, places):
    mask = torch.zeros_like(delta).view(-1)
    mask[places] = 1
    return delta * mask.view_as(delta)


def ties(base, targets, weight, density):
    deltas = deltas_of(base, targets)
    for delta, share in zip(deltas, density, strict=True):
        if share < 1:
            count = max(1, int(share * delta.numel()))
            delta.copy_(kept(delta, delta.abs().flatten().float().argsort(descending=True)[:count]))
    return summed(base, deltas, weight, True, True)


def trimmed_at_both_ends(base, targets, density, gamma):
    """Of equal magnitudes this program counts the last as the largest; we count the first."""
    deltas = deltas_of(base, targets)
    for delta, share, top in zip(deltas, density, gamma, strict=True):
        count = int(share * delta.numel())
        low = max(0, delta.numel() - count - int(top * delta.numel()))
        delta.copy_(kept(delta, delta.abs().flatten().float().sort().indices[low : low + count]))
    return deltas


def breadcrumbs(base, targets, weight, density, gamma):
    return summed(base, trimmed_at_both_ends(base, targets, density, gamma), weight, False, False)


def breadcrumbs_ties(base, targets, weight, density, gamma):
    return summed(base, trimmed_at_both_ends(base, targets, density, gamma), weight, True, False)


def selected(deltas, share, first=False):
    """Which of equally varying positions are selected is torch's choice, or those that come first."""
    if share >= 1:
        return deltas
    variance = deltas.var(dim=0, unbiased=False).flatten()
    count = int(variance.count_nonzero() * share)
    order = variance.argsort(descending=True, stable=True) if first else variance.topk(count).indices
    return deltas * kept(torch.ones_like(deltas[0]), order[:count])


def sce(base, targets, select_topk):
    deltas = selected(deltas_of(base, targets), select_topk)
    energies = deltas.square().flatten(1).mean(dim=1)
    total = energies.sum().item()
    shares = energies / total if total >= 1e-6 else torch.ones_like(energies) / len(energies)
    weights = shares.view(-1, *[1] * base.dim()) * agreeing(deltas)
    return base + (deltas * weights).sum(dim=0) / weights.sum(dim=0).clamp(min=1e-6)


def sce_released(base, targets, select_topk, first=False):
    deltas = deltas_of(base, targets)
    energies = [float((delta**2).sum()) / delta.numel() for delta in selected(deltas, select_topk, first)]
    total = sum(energies)
    shares = [energy / total for energy in energies] if total else [1 / len(energies)] * len(energies)
    weights = broadcast(shares, deltas) * agreeing(deltas)
    divisor = weights.sum(dim=0)
    return base + (deltas * weights).sum(dim=0) / torch.where(divisor == 0, 1, divisor)


def model_stock(base, targets):
    origin, weights = base.flatten(), [target.flatten() for target in targets]
    deltas, count = [weight - origin for weight in weights], len(weights)
    pairs = [(one, other) for place, one in enumerate(deltas) for other in deltas[place + 1 :]]
    cosines = [(one * other).sum() / (one.norm() * other.norm()).clamp(min=1e-6) for one, other in pairs]
    cosine = torch.stack([one.clamp(-1, 1) for one in cosines]).mean(dim=0)
    t = count * cosine / (1 + (count - 1) * cosine)
    return (t * (sum(weights) / count) + (1 - t) * origin).view_as(base)


def nuslerp(base, targets, weight):
    t, (first, second) = weight[1] / sum(weight), [target.flatten() for target in targets]
    cosine = (first / first.norm().clamp(min=1e-7) * (second / second.norm().clamp(min=1e-7))).sum().clamp(-1, 1)
    if 1 - cosine.square() <= 1e-16:
        return ((1 - t) * first + t * second).view_as(base)
    angle = cosine.acos()
    return ((((1 - t) * angle).sin() * first + (t * angle).sin() * second) / angle.sin()).view_as(base)


def karcher(base, targets, steps=10, tolerance=1e-5):
    norms = [torch.linalg.vector_norm(target.float()) for target in targets]
    units = [(target / norm).to(base.dtype) for target, norm in zip(targets, norms, strict=True) if norm > tolerance]
    if not units:
        return torch.zeros_like(base)
    mean = sum(unit / len(units) for unit in units)
    mean = on_sphere(mean)
    for _ in range(steps):
        tangent = torch.zeros_like(mean)
        for unit in units:
            dot = torch.dot(mean.flatten(), unit.flatten()).clamp(-1, 1)
            angle = dot.acos()
            if angle >= tolerance:
                tangent += angle / angle.sin() / len(units) * (unit - dot * mean)
        step = torch.linalg.vector_norm(tangent.float())
        if step < tolerance:
            break
        mean = on_sphere((step.cos() * mean + step.sin() * (tangent / step)).to(base.dtype))
    return sum(norm / len(norms) for norm in norms) * mean


def on_sphere(values):
    return (values / torch.linalg.vector_norm(values.float())).to(values.dtype)
