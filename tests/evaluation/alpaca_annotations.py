"""Annotations as AlpacaEval has them, drawn from a seed: preferences, lengths, difficulties, gamed baselines."""

import csv

import numpy as np


def expit(x):
    return 1 / (1 + np.exp(-x))


def annotations(seed, num_items, skill, length_effect):
    """Columns of a model's annotations: preference from 0 to 1, lengths, difficulty."""
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(0, 1, num_items).round(6)
    baseline_lengths = rng.integers(200, 3000, num_items)
    lengths = (baseline_lengths * rng.lognormal(-0.2, 0.6, num_items)).astype(int) + 1
    delta = baseline_lengths - lengths
    logits = (
        skill - 0.6 * difficulty - length_effect * np.tanh(delta / delta.std(ddof=1)) + rng.normal(0, 1, num_items)
    )
    return {
        "preference": expit(logits).round(6),
        "baseline_lengths": baseline_lengths,
        "lengths": lengths,
        "difficulty": difficulty,
    }


def write_gamed(path, seed, difficulty):
    """A table like `df_gamed.csv`: the baseline made longer and shorter, against itself."""
    rng = np.random.default_rng(seed)
    columns = ["preference", "index", "std_delta_len", "instruction_difficulty", "not_gamed_baseline", "model"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for name, sign in (("concise", 1), ("verbose", -1)):
            for index, hard in enumerate(difficulty):
                delta = sign * abs(rng.normal(1, 0.5))
                preference = expit(-0.9 * np.tanh(delta) + rng.normal(0, 0.5))
                writer.writerow([f"{preference:.6f}", index, f"{delta:.6f}", hard, False, name])
