"""Scores of masked genes, one gene at a time in plain Python: slow, and meant to be obvious.

A cell is ``{gene: bin}`` of its expressed genes. A masked gene is a dict: ``gene``, ``truth``, ``predicted``, ``loss``
(of the model), ``visible`` (bins of the cell's genes that are not masked).
"""

import math


def commonest(bins):
    """Return the bin that comes most often, the lowest of several."""
    return min(set(bins), key=lambda number: (-bins.count(number), number))


def answers(masked, training, num_bins):
    """Return what each way of answering says of one masked gene; training is the list of training cells."""
    everything = [number for cell in training for number in cell.values()]
    own = [cell[masked["gene"]] for cell in training if masked["gene"] in cell]
    known = own or everything
    in_bin = own.count(masked["truth"]) + 1
    return {
        "model": masked["predicted"],
        "gene_majority": commonest(known),
        "gene_mean": math.floor(sum(known) / len(known) + 0.5),
        "cell_majority": commonest(masked["visible"] or [commonest(everything)]),
        "frequency_loss": -math.log(in_bin / (len(own) + num_bins - 1)),
    }


def share(flags):
    """Return the share that is true; None of nothing."""
    return sum(flags) / len(flags) if flags else None


def slow_scores(masked_genes, training, num_bins):
    """Return the scores over all masked genes, and the list of those by true bin."""
    said = [answers(masked, training, num_bins) for masked in masked_genes]
    truth = [masked["truth"] for masked in masked_genes]
    majority = commonest(truth)

    def right(name, chosen):
        return share([said[at][name] == truth[at] for at in chosen])

    def mean(values):
        return sum(values) / len(values) if values else None

    everyone = range(len(truth))
    overall = {
        "masked_accuracy": right("model", everyone),
        "majority_bin_accuracy": share([number == majority for number in truth]),
        "gene_majority_accuracy": right("gene_majority", everyone),
        "gene_mean_accuracy": right("gene_mean", everyone),
        "cell_majority_accuracy": right("cell_majority", everyone),
        "masked_loss": mean([masked["loss"] for masked in masked_genes]),
        "gene_frequency_loss": mean([one["frequency_loss"] for one in said]),
        "majority_bin_share": share([one["model"] == majority for one in said]),
        "num_masked_genes": len(truth),
    }
    by_bin = []
    for number in range(1, num_bins):
        chosen = [at for at in everyone if truth[at] == number]
        by_bin.append(
            {
                "bin": number,
                "num_masked_genes": len(chosen),
                "accuracy": right("model", chosen),
                "gene_majority_accuracy": right("gene_majority", chosen),
                "gene_mean_accuracy": right("gene_mean", chosen),
                "cell_majority_accuracy": right("cell_majority", chosen),
                "loss": mean([masked_genes[at]["loss"] for at in chosen]),
                "gene_frequency_loss": mean([said[at]["frequency_loss"] for at in chosen]),
            }
        )
    return overall, by_bin
