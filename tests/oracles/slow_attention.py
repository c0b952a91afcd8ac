"""LSH attention a token at a time, in float64 NumPy loops: slow and obvious."""

import numpy as np


def slow_lsh_attention(query_key, value, rotations, bucket_size, is_token):
    """One cell, one head: query_key and value (L, D), rotations (R, D, C), is_token (L,) -> (L, D)."""
    query_key, value = np.asarray(query_key, np.float64), np.asarray(value, np.float64)
    tokens = [i for i in range(len(query_key)) if is_token[i]]
    num_chunks = -(-len(tokens) // bucket_size)
    columns = min(max(1, -(-num_chunks // 2)), rotations.shape[-1])
    numerators, denominators = np.zeros_like(value), np.zeros(len(value))
    found_other = np.zeros(len(value), bool)
    for rotation in np.asarray(rotations, np.float64)[:, :, :columns]:
        bucket = {}
        for i in tokens:
            projected = query_key[i] @ rotation
            bucket[i] = int(np.argmax(np.concatenate([projected, -projected])))
        order = sorted(tokens, key=lambda i: (bucket[i], i))
        for rank, i in enumerate(order):
            chunk = rank // bucket_size
            seen = order[max(chunk - 1, 0) * bucket_size : (chunk + 1) * bucket_size]
            for j in seen:
                if j != i:
                    weight = np.exp(score(query_key, i, j))
                    numerators[i] += weight * value[j]
                    denominators[i] += weight
                    found_other[i] = True
    result = np.zeros_like(value)
    for i in tokens:
        result[i] = numerators[i] / denominators[i] if found_other[i] else value[i]
    return result


def slow_exact_attention(query_key, value, is_token):
    """One cell, one head, every other token: (L, D)."""
    return slow_lsh_attention(query_key, value, np.ones((1, query_key.shape[-1], 1)), len(query_key), is_token)


def score(query_key, i, j):
    """Return the scaled product of a query with a key of unit length."""
    norm = max(np.linalg.norm(query_key[j]), 1e-12)
    return query_key[i] @ query_key[j] / norm / np.sqrt(query_key.shape[-1])
