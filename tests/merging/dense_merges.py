"""Merge methods as their papers write them, on whole tensors in float64: what rounding is measured against."""

import math

import torch


def linear(base, targets, weight, normalize=True):
    weights = [w / sum(weight) if normalize else w for w in weight]
    return sum(w * target for w, target in zip(weights, targets, strict=True))


def task_arithmetic(base, targets, weight, normalize=False, **scale):
    deltas = [target - base for target in targets]
    return base + scale.get("lambda", 1.0) * linear(None, deltas, weight, normalize)


def elected(base, kept, weight, normalize):
    weighted = torch.stack([w * one for w, one in zip(weight, kept, strict=True)])
    sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agrees = weighted * sign > 0
    total = (weighted * agrees).sum(0)
    divisor = (agrees * torch.tensor(weight, dtype=torch.float64).view(-1, *[1] * base.dim())).sum(0)
    return base + (total / torch.where(divisor == 0, 1.0, divisor) if normalize else total)


def smaller_zeroed(delta, density):
    flat = delta.flatten().abs()
    kept = flat.argsort(descending=True, stable=True)[: max(1, int(density * len(flat)))]
    return delta * torch.zeros_like(flat).index_fill(0, kept, 1.0).view_as(delta)


def both_ends_zeroed(delta, density, gamma):
    flat = delta.flatten().abs()
    keep = int(density * len(flat))
    top = min(int(gamma * len(flat)), len(flat) - keep)
    kept = flat.argsort(descending=True, stable=True)[top : top + keep]
    return delta * torch.zeros_like(flat).index_fill(0, kept, 1.0).view_as(delta)


def ties(base, targets, weight, density, normalize=True):
    kept = [smaller_zeroed(target - base, share) for target, share in zip(targets, density, strict=True)]
    return elected(base, kept, weight, normalize)


def trimmed(base, targets, density, gamma):
    shares = zip(targets, density, gamma, strict=True)
    return [both_ends_zeroed(target - base, keep, top) for target, keep, top in shares]


def breadcrumbs(base, targets, weight, density, gamma):
    return base + linear(None, trimmed(base, targets, density, gamma), weight, normalize=False)


def breadcrumbs_ties(base, targets, weight, density, gamma):
    return elected(base, trimmed(base, targets, density, gamma), weight, normalize=False)


def cosine(one, other):
    lengths = one.norm() * other.norm()
    return float((one * other).sum() / lengths) if lengths > 0 else 0.0


def model_stock(base, targets):
    deltas = [target - base for target in targets]
    count = len(deltas)
    pairs = [cosine(deltas[i], deltas[j]) for i in range(count) for j in range(i + 1, count)]
    mean = sum(pairs) / len(pairs)
    return base + count * mean / (1 + (count - 1) * mean) * sum(deltas) / count


def arc(targets, t):
    one, other = targets
    angle = math.acos(max(-1.0, min(1.0, cosine(one, other)))) if one.norm() * other.norm() > 0 else 0.0
    if math.sin(angle) < 1e-8:
        return (1 - t) * one + t * other
    return (math.sin((1 - t) * angle) * one + math.sin(t * angle) * other) / math.sin(angle)


def slerp(base, targets, t):
    return (1 - t) * targets[0] + t * targets[1] if cosine(*targets) > 0.9995 else arc(targets, t)


def nuslerp(base, targets, weight):
    return arc(targets, weight[1] / sum(weight))


def karcher(base, targets, steps=10, tolerance=1e-5):
    moved = [target for target in targets if target.norm() > 0]
    if not moved:
        return torch.zeros_like(targets[0])
    units = [target / target.norm() for target in moved]
    mean = sum(units) / sum(units).norm()
    for _ in range(steps):
        tangent = torch.zeros_like(mean)
        for unit in units:
            dot = max(-1.0, min(1.0, float((mean * unit).sum())))
            angle = math.acos(dot)
            if angle > 1e-12:
                tangent += angle / math.sin(angle) * (unit - dot * mean) / len(units)
        step = float(tangent.norm())
        if step < tolerance:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        mean = mean / mean.norm()
    return mean * sum(float(target.norm()) for target in targets) / len(targets)


def most_varying(deltas, share):
    if share >= 1:
        return torch.ones_like(deltas[0])
    variance = deltas.var(dim=0, unbiased=False).flatten()
    count = int(share * int((variance != 0).sum()))
    kept = variance.argsort(descending=True, stable=True)[:count]
    return torch.zeros_like(variance).index_fill(0, kept, 1.0).view_as(deltas[0])


def sce(base, targets, select_topk):
    """With divided positions, as both programs have it."""
    return _sce(base, *_selected(base, targets, select_topk, both=True))


def sce_mergekit(base, targets, select_topk):
    """With uniform shares where the deltas are small, and a least divisor."""
    deltas, energies = _selected(base, targets, select_topk, both=True)
    if float(energies.sum()) / base.numel() < 1e-6:
        energies = torch.ones_like(energies)
    return _sce(base, deltas, energies, least=1e-6)


def sce_released(base, targets, select_topk):
    return _sce(base, *_selected(base, targets, select_topk, both=False))


def _selected(base, targets, share, both):
    """Deltas (those selected, if `both`), and energies of the selected ones."""
    deltas = torch.stack([target - base for target in targets])
    selected = deltas * most_varying(deltas, share)
    return selected if both else deltas, selected.square().flatten(1).sum(dim=1)


def _sce(base, deltas, energies, least=0.0):
    uniform = torch.full_like(energies, 1 / len(energies))
    shares = energies / energies.sum() if energies.sum() > 0 else uniform
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    weights = shares.view(-1, *[1] * base.dim()) * (deltas * sign > 0)
    divisor = weights.sum(0).clamp(min=least)
    return base + (weights * deltas).sum(0) / torch.where(divisor == 0, 1.0, divisor)
