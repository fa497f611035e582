"""The whole `mined` map: every token of the source without an equal to the nearest string of the pivot, exactly.

The reference is the whole matrix of distances in blocks (rapidfuzz, one thread), timed on a sample; both must agree on
it token for token. Times are those of the thread's clock.
"""

import resource
import time

import numpy as np
from measure import RESULTS, Row, inputs, parser, report
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from fusion.alignment import Alignment, VocabularyPair, build_alignment
from fusion.alignment.strategies.mined import token_strings

QUERIES_AT_ONCE = 64
KIBI = 1 << 10


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--sample", type=int, default=2000, help="tokens that brute force maps, too")
    options.add_argument("--repeats", type=int, default=3, help="runs of the whole map")
    chosen = options.parse_args()
    data = inputs(chosen.data)
    tokenizers = data.pivot, data.source
    pair = build_alignment("mined", *tokenizers).pair
    sought = np.flatnonzero((pair.equal_ids < 0) & (pair.source.width > 0))
    sample = np.sort(np.random.default_rng(0).permutation(sought)[: chosen.sample])
    first, target_V = _whole_map(build_alignment("mined", *tokenizers))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / KIBI
    best = min(_whole_map(build_alignment("mined", *tokenizers))[0] for _ in range(chosen.repeats))
    brute_force, expected = _brute_force(pair, sample)
    differences = int((target_V[sample] != expected).sum())
    assert not differences
    whole = brute_force * len(sought) / len(sample)
    dense = 4 * len(pair.pivot) * len(pair.source) / KIBI**2
    rows = [
        Row(f"map of {len(sought):,} tokens to {len(pair.pivot):,} strings", whole, best, "s"),
        Row("the same, first time in a process (compiled code is loaded, or made once)", whole, first, "s"),
        Row("per token", brute_force / len(sample) * 1e6, best / len(sought) * 1e6, "us"),
        Row("most memory of the whole process, against a dense int32 matrix", dense, peak, "MiB"),
        Row(f"differences on {len(sample):,} tokens", None, differences, "tokens"),
    ]
    facts = {"inputs": data.origin, "reference": f"extrapolated from {len(sample)} tokens: {brute_force:.2f} s"}
    report("vocabulary map", rows, chosen.out or RESULTS / "vocabulary_map.json", **facts)


def _whole_map(alignment: Alignment) -> tuple[float, np.ndarray]:
    """Seconds from the byte tables and equal tokens on, and the map, int32 [V_source]."""
    started = time.thread_time()
    target_V = alignment.targets(np.arange(len(alignment.pair.source)))
    return time.thread_time() - started, target_V


def _brute_force(pair: VocabularyPair, sample: np.ndarray) -> tuple[float, np.ndarray]:
    """Seconds, and the first of the nearest pivot tokens of every sampled one."""
    table = pair.pivot
    strings = token_strings(table, pair.pivot_tokenizer)
    near = [token for token in range(len(table)) if table.width[token] and token not in table.byte_pieces]
    others = [strings[token] for token in near]
    source = token_strings(pair.source, pair.source_tokenizer)
    queries = [source[token] for token in sample.tolist()]
    started = time.thread_time()
    first = [
        cdist(queries[at : at + QUERIES_AT_ONCE], others, scorer=Levenshtein.distance, dtype=np.int32).argmin(axis=1)
        for at in range(0, len(queries), QUERIES_AT_ONCE)
    ]
    return time.thread_time() - started, np.array(near)[np.concatenate(first)]


if __name__ == "__main__":
    main()
