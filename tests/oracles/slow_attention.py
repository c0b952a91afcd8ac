"""LSH attention a token at a time, in float64 NumPy loops: slow and obvious."""

import numpy as np


def slow_lsh_attention(query_key, value, rotations, bucket_size, is_token, hashing="cross_polytope"):
    """One cell, one head: query_key and value (L, D), rotations (R, D, C), is_token (L,) -> (L, D)."""
    query_key, value = np.asarray(query_key, np.float64), np.asarray(value, np.float64)
    tokens = [i for i in range(len(query_key)) if is_token[i]]
    numerators, denominators = np.zeros_like(value), np.zeros(len(value))
    found_other = np.zeros(len(value), bool)
    for order in slow_lsh_order(query_key, rotations, bucket_size, is_token, hashing):
        order = order[: len(tokens)]
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


def slow_lsh_order(query_key, rotations, bucket_size, is_token, hashing):
    """One cell, one head: each round's tokens by bucket, then by position, then padding by position, (R, L)."""
    query_key, rotations = np.asarray(query_key, np.float64), np.asarray(rotations, np.float64)
    tokens = [i for i in range(len(query_key)) if is_token[i]]
    padding = [i for i in range(len(query_key)) if not is_token[i]]
    columns = min(slow_num_columns(len(tokens), bucket_size, hashing), rotations.shape[-1])
    find_bucket = {"sign": sign_bucket, "cross_polytope": cross_polytope_bucket}[hashing]
    orders = []
    for rotation in rotations[:, :, :columns]:
        bucket = {i: find_bucket(query_key[i] @ rotation) for i in tokens}
        orders.append(sorted(tokens, key=lambda i, bucket=bucket: (bucket[i], i)) + padding)
    return orders


def slow_num_columns(num_tokens, bucket_size, hashing):
    """Return the fewest columns that have a bucket for every chunk, with three more halvings of each for signs."""
    num_chunks, columns = -(-num_tokens // bucket_size), 1
    if hashing == "sign":
        while 2**columns < 8 * num_chunks:
            columns += 1
        return max(columns, 3)
    while 2 * columns < num_chunks:
        columns += 1
    return columns


def sign_bucket(projected):
    """Read the columns' signs as a binary number, the first column the most significant digit."""
    return int("".join("1" if number > 0 else "0" for number in projected), base=2)


def cross_polytope_bucket(projected):
    """Return the nearest of the columns and their opposites."""
    return int(np.argmax(np.concatenate([projected, -projected])))
