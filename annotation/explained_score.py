"""What is explained: a class's score of one cell, as a smooth function of the embeddings of its genes' bins.

A cell's tokens stay the same while their bins' embeddings change: in the full space every gene, in the expressed space
the genes that this cell expresses. Which tokens attend to which stays too, as it is for the cell itself, see
`TokenOrders`: so the function that is explained is the model's at the cell, and has no jumps on the way there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import logsumexp, softmax
from torch import Tensor

from screformer.annotation.label_tree import LabelTree, label_names_of
from screformer.configuration_screformer import ScReformerConfig
from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.reversible import TokenOrders
from screformer.train.collator import GeneSpace

Bins = npt.NDArray[np.uint8]
Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
ScoreKind = Literal["logit", "log_odds"]
SCORE_KINDS: tuple[ScoreKind, ...] = ("logit", "log_odds")


class ClassScore(NamedTuple):
    """What of a classifier's logits is explained.

    Attributes
    ----------
    name
        Of the class.
    members
        Its leaves, as positions among the logits; one, unless the class stands above others in the model's label tree.
    kind
        ``"logit"``: the logit, of several leaves the log of the sum of their exponentials. ``"log_odds"``: that less
        the same of all other leaves, which is the log odds of the class's probability.
    """

    name: str
    members: tuple[int, ...]
    kind: ScoreKind = "logit"

    @classmethod
    def parse(cls, config: ScReformerConfig, text: str, kind: ScoreKind = "logit") -> ClassScore:
        """Return the score of a class of a classifier.

        Parameters
        ----------
        config
            Of the classifier.
        text
            A label, one above its labels in its tree, or ``NAME=LABEL|LABEL``: several labels as one class.
        kind
            See above.

        Raises
        ------
        ValueError
            There is no such label, `kind` is neither of the two, or the class is all that there is.
        """
        if kind not in SCORE_KINDS:
            raise ValueError(f"score got {kind!r}; allowed are {', '.join(map(repr, SCORE_KINDS))}")
        leaves = label_names_of(config)
        tree = _tree_of(config)
        name, is_joined, joined = text.partition("=")
        labels = joined.split("|") if is_joined and text not in tree.labels else [text]
        unknown = [label for label in labels if label not in tree.labels]
        if unknown:
            raise ValueError(
                f"class {text!r}: {unknown} are none of the model's labels; it has {', '.join(tree.labels)}. Several "
                "as one class: NAME=LABEL|LABEL"
            )
        members = tuple(at for at, leaf in enumerate(leaves) if any(tree.is_within(leaf, label) for label in labels))
        if len(members) == len(leaves):
            raise ValueError(f"class {text!r} holds every label of the model, so that nothing tells it from others")
        return cls(text if labels == [text] else name, members, kind)

    def labels(self, config: ScReformerConfig) -> list[str]:
        """Return what cells of the class may be called: its name, and every label of the tree that holds only members.

        Parameters
        ----------
        config
            Of the classifier.
        """
        tree, leaves = _tree_of(config), label_names_of(config)
        members = {leaves[member] for member in self.members}
        is_in_tree = self.name in tree.labels
        within = [
            label
            for label, leaves_below in zip(tree.labels, tree.membership, strict=True)
            if members >= {leaf for leaf, is_below in zip(tree.leaves, leaves_below, strict=True) if is_below}
            and (not is_in_tree or tree.is_within(label, self.name))
        ]
        return list(dict.fromkeys([self.name, *within]))

    def __call__(self, logits: Tensor) -> Tensor:
        """Return scores (B,) of logits (B, num_labels); see also `slopes`."""
        members = list(self.members)
        score = logits[:, members].logsumexp(dim=1)
        if self.kind == "logit":
            return score
        others = [number for number in range(logits.shape[1]) if number not in self.members]
        return score - logits[:, others].logsumexp(dim=1)

    def used(self, num_labels: int) -> list[int]:
        """Return which of the logits the score depends on."""
        return list(self.members) if self.kind == "logit" else list(range(num_labels))

    def of_used(self, logits: FloatArray, num_labels: int) -> FloatArray:
        """Return the scores (...) of the logits (..., number of them) that `used` names."""
        members, others = self._members_and_others(logits, num_labels)
        score: FloatArray = logsumexp(members, axis=-1)
        return score if others is None else score - logsumexp(others, axis=-1)

    def slopes(self, logits: FloatArray, num_labels: int) -> FloatArray:
        """Return the score's derivatives by the logits that it depends on.

        Parameters
        ----------
        logits
            (..., number of them), in the order of `used`.
        num_labels
            Of the classifier.
        """
        members, others = self._members_and_others(logits, num_labels)
        slopes: FloatArray = softmax(members, axis=-1)
        return slopes if others is None else slopes - softmax(others, axis=-1)

    def _members_and_others(self, logits: FloatArray, num_labels: int) -> tuple[FloatArray, FloatArray | None]:
        """Return the logits with only members left, and with only the others where they count."""
        is_member = np.isin(self.used(num_labels), self.members)
        others = None if is_member.all() else np.where(is_member, -np.inf, logits)
        return np.where(is_member, logits, -np.inf), others


def _tree_of(config: ScReformerConfig) -> LabelTree:
    return LabelTree(config.label_parents or dict.fromkeys(label_names_of(config)))


class ExplainedCell:
    """One cell's score as a function of its bins, or of embeddings in their place.

    Parameters
    ----------
    model
        A classifier in eval mode; its parameters need no gradient.
    score
        What of its logits.
    bins
        (num_genes,): the cell's bin of each gene of the vocabulary.
    gene_space
        ``"full"`` or ``"expressed"``.
    batch_size
        Points that are worked on together.

    Attributes
    ----------
    model, class_score
        As given.
    positions
        (L,): of the cell's tokens in the vocabulary, rising.
    levels
        (L,): their bins.
    logits
        (num_labels,): of the cell.
    score
        Of the cell, of its class.
    """

    def __init__(
        self,
        model: ScReformerForCellClassification,
        score: ClassScore,
        bins: Bins,
        *,
        gene_space: GeneSpace,
        batch_size: int = 8,
    ) -> None:
        self.model, self.class_score, self._batch_size = model, score, batch_size
        self.positions = np.arange(len(bins)) if gene_space == "full" else np.flatnonzero(bins)
        self.levels = bins[self.positions]
        device = model.device
        self._genes = None if gene_space == "full" else torch.from_numpy(self.positions).to(device)
        self._levels = torch.from_numpy(self.levels.astype(np.int64)).to(device)
        self.table = model.get_input_embeddings().weight[: model.config.num_bins].detach()
        self._orders = TokenOrders()
        with torch.no_grad():
            logits = self._logits(self.table[self._levels][None])
        self.logits = logits[0].double().cpu().numpy()
        self.score = float(score(logits)[0])

    @property
    def num_bins(self) -> int:
        """How many bins there are, "not expressed" included."""
        return len(self.table)

    def at_bins(self, levels: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
        """Return the scores (K,) with other bins (K, L) in the place of the cell's."""
        scores = []
        with torch.no_grad():
            for rows in self._batches(len(levels)):
                given = torch.from_numpy(levels[rows].astype(np.int64)).to(self.table.device)
                scores.append(self._forward(self.table[given]).double().cpu().numpy())
        return np.concatenate(scores)

    def at_embeddings(self, embeddings: Tensor) -> Tensor:
        """Return the scores (K,) at embeddings (K, L, hidden) in the place of the cell's, with a graph if they have."""
        return self._forward(embeddings)

    def gradients(
        self, embeddings: Callable[[slice], Tensor], num_points: int, *, logits: npt.NDArray[np.int64] | None = None
    ) -> Iterator[tuple[slice, npt.NDArray[np.float64]]]:
        """Yield (points, (K, L, num_bins)): the score's gradient at each point, along the embedding of each bin.

        Parameters
        ----------
        embeddings
            Gives the embeddings (K, L, hidden) of some of the points.
        num_points
            How many there are.
        logits
            (num_points,): take the gradient of this logit instead, of each point another.
        """
        for rows in self._batches(num_points):
            leaf = embeddings(rows).detach().requires_grad_()
            with torch.enable_grad():
                found = self._logits(leaf)
                if logits is None:
                    chosen = self.class_score(found)
                else:
                    chosen = found.gather(1, torch.from_numpy(logits[rows]).to(found.device)[:, None])
                (gradient,) = torch.autograd.grad(chosen.sum(), leaf)
            yield rows, (gradient.float() @ self.table.float().T).double().cpu().numpy()

    def _batches(self, number: int) -> list[slice]:
        return [slice(start, min(start + self._batch_size, number)) for start in range(0, number, self._batch_size)]

    def _forward(self, embeddings: Tensor) -> Tensor:
        return self.class_score(self._logits(embeddings))

    def _logits(self, embeddings: Tensor) -> Tensor:
        number = len(embeddings)
        logits: Tensor = self.model(
            input_ids=self._levels.expand(number, -1),
            gene_ids=None if self._genes is None else self._genes.expand(number, -1),
            inputs_embeds=embeddings,
            token_orders=self._orders,
        ).logits
        return logits.float()
