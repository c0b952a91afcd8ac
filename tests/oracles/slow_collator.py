"""Which genes of a cell are masked, gene by gene in Python's own integers: slow, and meant to be obvious."""

MODULUS = 2**64
MASK_STREAM, REPLACE_STREAM = 2, 3


def splitmix64(value):
    """One output of the generator of Steele, Lea and Flood (2014)."""
    mixed = (value + 0x9E3779B97F4A7C15) % MODULUS
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % MODULUS
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % MODULUS
    return mixed ^ (mixed >> 31)


def slow_masks(cell, *, seed, masked_fraction, replace_probability):
    """Return (masked genes, those of them that the model sees as the mask token) of {gene: bin}, masks being fixed."""
    content = sum(splitmix64(gene * 256 + bin_id) for gene, bin_id in cell.items()) % MODULUS
    cell_lot = splitmix64(content ^ splitmix64(seed))
    lots = {gene: splitmix64((cell_lot + gene) % MODULUS) for gene in cell}
    order = sorted(cell, key=lambda gene: splitmix64(lots[gene] ^ MASK_STREAM))
    masked = set(order[: max(1, round(masked_fraction * len(cell)))])
    limit = round(replace_probability * 2**53)
    return masked, {gene for gene in masked if splitmix64(lots[gene] ^ REPLACE_STREAM) >> 11 < limit}
