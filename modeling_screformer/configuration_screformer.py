"""Validated configuration of scReformer-BERT, with the presets of the paper."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

AUTO_MAP = {
    "AutoConfig": "configuration_screformer.ScReformerConfig",
    "AutoModel": "modeling_screformer.ScReformerModel",
    "AutoModelForMaskedLM": "modeling_screformer.ScReformerForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_screformer.ScReformerForCellClassification",
}

# PAPER, sections 2.5 and 2.9. `base` is the stated shape; `large` reaches the stated sizes (95M encoder, 30M head).
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "num_hashes": 2,
        "hidden_dropout_prob": 0.0,
        "classifier_hidden_sizes": [128, 64],
    },
    "base": {},
    "large": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3328,
        "classifier_hidden_sizes": [1664, 640],
    },
}

POSITIVE_FIELDS = (
    "num_genes",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "num_hashes",
)
CLASSIFIER_PATHS = ("convolution", "pooled", "linear")
MIN_BINS, MAX_BINS = 3, 254  # a corpus stores token ids, bins and two special ones, as uint8


@strict
class ScReformerConfig(PreTrainedConfig):
    """Shape and options of a scReformer-BERT model; the defaults are the preset ``base``.

    Token ids are expression bins: 0 is "not expressed", ``1 .. num_bins - 1`` are levels of expression, then come
    ``pad_token_id`` (``num_bins``) and ``mask_token_id`` (``num_bins + 1``). A gene is a position from 0 to
    ``num_genes - 1``.

    Parameters
    ----------
    num_genes
        Size of the gene vocabulary; a checkpoint's tokenizer has the same.
    num_bins
        Number of expression bins, bin 0 included (3 to 254).
    hidden_size, num_hidden_layers, num_attention_heads, intermediate_size
        Shape of the encoder, in transformers' words.
    bucket_size
        Tokens a chunk of LSH attention. A cell no longer than this gets exact attention.
    num_hashes
        Rounds of hashing; more are nearer to exact attention and slower.
    hashing
        ``"sign"`` (random hyperplanes, the faster) or ``"cross_polytope"`` (the Reformer paper's).
    hash_seed
        Seed of the hash rotations. They are stored in the checkpoint, so that hashing is part of the model.
    attention
        ``"lsh"`` or ``"exact"``: the same weights with full attention.
    gene_space
        How cells are laid out by default: ``"full"`` (every gene) or ``"expressed"`` (only the genes with counts).
    reversible
        Recompute activations in the backward pass instead of storing them (section 2.3.2); the numbers are the same.
    hidden_dropout_prob
        Dropout after the embeddings, the attention and the feed-forward network.
    embedding_initializer_range
        Standard deviation of the initial embeddings, comparable to the sinusoids added to them. Other weights start
        at one over the square root of their inputs, so that no width drowns or lifts the signal.
    classifier_paths
        What the cell classifier's logits are the sum of: ``"convolution"`` (the paper's, and the default), ``"pooled"``
        (mean and maximum over the expressed genes) and ``"linear"`` (each gene's bin, as in a logistic regression).
    classifier_hidden_sizes, classifier_dropout
        The two hidden widths of the three-layer cell classifier, and the dropout between them; the pooled path has the
        second of the widths.
    label_parents
        Label -> its parent, None at the top, of a classifier that names cells at several levels; its classes are the
        leaves.
    calibration
        Of a classifier, what its probabilities and answers are read with: ``temperatures``, one a level of the labels,
        and ``thresholds`` of the probability with the ``error_rates`` that they keep; it holds for the ``classes`` it
        names. Logits are as they were.
    tokenizer_fingerprint
        Fingerprint of the tokenizer that the weights were trained with; training refuses another one.

    Raises
    ------
    huggingface_hub.errors.StrictDataclassError
        When a value has the wrong type or values do not fit together; the message names them and the remedy.

    Examples
    --------
    >>> config = ScReformerConfig.preset("tiny", num_genes=18000, num_labels=9)
    >>> config.vocab_size, config.mask_token_id
    (8, 7)
    """

    model_type = "screformer"
    # What the Trainer's predictions leave out: a classifier's are its logits.
    keys_to_ignore_at_inference = ["cell_embedding", "hidden_states"]  # noqa: RUF012 - a list is what the Trainer adds to

    num_genes: int = 17_330
    num_bins: int = 6
    hidden_size: int = 200
    num_hidden_layers: int = 6
    num_attention_heads: int = 10
    intermediate_size: int = 800
    bucket_size: int = 64
    num_hashes: int = 4
    hashing: Literal["sign", "cross_polytope"] = "sign"
    hash_seed: int = 2022
    attention: Literal["lsh", "exact"] = "lsh"
    gene_space: Literal["full", "expressed"] = "full"
    reversible: bool = True
    hidden_dropout_prob: float | int = 0.1
    layer_norm_eps: float = 1e-5
    embedding_initializer_range: float | int = 0.5
    classifier_paths: list[str] | None = None
    classifier_hidden_sizes: list[int] | None = None
    classifier_dropout: float | int = 0.1
    label_parents: dict[str, str | None] | None = None
    calibration: dict[str, list[float] | list[str]] | None = None
    tokenizer_fingerprint: str | None = None
    pad_token_id: int | None = None
    mask_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Derive the special token ids and the checkpoint's class map."""
        if self.classifier_paths is None:
            self.classifier_paths = ["convolution"]
        if self.classifier_hidden_sizes is None:
            self.classifier_hidden_sizes = [512, 100]
        if self.pad_token_id is None:
            self.pad_token_id = self.num_bins
        if self.mask_token_id is None:
            self.mask_token_id = self.num_bins + 1
        # Every class, so that each checkpoint opens in each head whichever class saved it.
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "ScReformerConfig":
        """Return the configuration ``"tiny"``, ``"base"`` or ``"large"``, with fields replaced by ``overrides``."""
        if name not in PRESETS:
            msg = f"preset got {name!r}; allowed are {', '.join(PRESETS)}. Other shapes: ScReformerConfig(...)."
            raise ValueError(msg)
        return cls(**{**PRESETS[name], **overrides})

    @property
    def vocab_size(self) -> int:
        """Number of token ids: the bins, [PAD] and [MASK]."""
        return self.num_bins + 2

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def max_hash_columns(self) -> int:
        """Random directions a hash round needs for a cell with every gene."""
        from .lsh_hashing import num_hash_columns  # here, so that a configuration alone does not load torch

        return num_hash_columns(self.num_genes, self.bucket_size, self.hashing)

    def validate_architecture(self) -> None:
        """Raise ValueError where sizes do not fit together."""
        for name in POSITIVE_FIELDS:
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} got {value}; it must be at least 1.")
        if self.hidden_size % self.num_attention_heads:
            msg = (
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}; "
                "change one of them."
            )
            raise ValueError(msg)
        if self.hidden_size % 2:
            msg = f"hidden_size got {self.hidden_size}; it must be even (sines and cosines share it)."
            raise ValueError(msg)
        if self.bucket_size < 2:
            msg = f"bucket_size got {self.bucket_size}; it must be at least 2 (32 to 128 are usual)."
            raise ValueError(msg)

    def validate_tokens(self) -> None:
        """Raise ValueError where bins or special ids are not those of the contract."""
        if not MIN_BINS <= self.num_bins <= MAX_BINS:
            msg = f"num_bins got {self.num_bins}; allowed are {MIN_BINS} to {MAX_BINS} (token ids are stored as uint8)."
            raise ValueError(msg)
        expected = (self.num_bins, self.num_bins + 1)
        if (self.pad_token_id, self.mask_token_id) != expected:
            msg = (
                f"pad_token_id, mask_token_id got {self.pad_token_id}, {self.mask_token_id}; with num_bins="
                f"{self.num_bins} they are {expected[0]}, {expected[1]}. Leave them out: they follow from num_bins."
            )
            raise ValueError(msg)

    def validate_rates(self) -> None:
        """Raise ValueError where dropout, initial scales or the classifier's widths are out of range."""
        for name in ("hidden_dropout_prob", "classifier_dropout"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"{name} got {value}; it must be in [0, 1).")
        paths = self.classifier_paths
        if not paths or len(set(paths)) < len(paths) or not set(paths) <= set(CLASSIFIER_PATHS):
            allowed = ", ".join(map(repr, CLASSIFIER_PATHS))
            raise ValueError(f"classifier_paths got {paths}; it must be one or more of {allowed}, each once.")
        widths = self.classifier_hidden_sizes
        if widths is None or len(widths) != 2 or min(widths) < 1:
            msg = f"classifier_hidden_sizes got {widths}; it must be two positive widths, for example [512, 100]."
            raise ValueError(msg)


ScReformerConfig.register_for_auto_class()
