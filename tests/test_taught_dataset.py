import numpy as np
from small_corpus import make_corpus
from small_teacher import make_teacher

from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization.corpus import open_corpus
from screformer.train.taught_dataset import TaughtCellCollator, TaughtCellDataset


def test_targets_are_those_of_the_whole_cell_whatever_genes_are_dropped(tmp_path):
    opened = open_corpus(make_corpus(tmp_path))
    rows = np.arange(10)
    model = ScReformerForCellClassification.from_pretrained(make_teacher(tmp_path / "teacher"))

    class Answers:
        def of(self, rows):
            return np.stack([rows, -rows], axis=1).astype(np.float32)

    cells = TaughtCellDataset(opened, rows, class_ids=rows % 2, teacher_logits=Answers())
    batch = TaughtCellCollator.from_config(model.config, gene_dropout=0.5, seed=1)(cells.__getitems__([7, 2]))
    assert batch["labels"].tolist() == [[1, 7, -7], [0, 2, -2]]
    assert (batch["input_ids"] > 0).sum() < 0.8 * sum(len(cells[row]["gene_ids"]) for row in (7, 2))
