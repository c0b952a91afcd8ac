"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Layer = Annotated[str | None, typer.Option(help="Layer that holds the raw counts. Default: found by its values.")]
GeneColumn = Annotated[str | None, typer.Option(help="Column of var with Ensembl ids or symbols. Default: found.")]
Allow = Annotated[
    list[str] | None, typer.Option(help="Code of a problem to accept, as inspect names it. Give it once for each.")
]
Model = Annotated[str, typer.Option(help="Checkpoint folder or Hub id.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where to write.")]
BatchSize = Annotated[
    str, typer.Option(help="Cells a forward pass, or auto: as many as fit into memory. The results stay the same.")
]
Space = Annotated[Literal["full", "expressed"] | None, typer.Option(help="Gene space instead of the checkpoint's own.")]
Key = Annotated[str, typer.Option(help="Prefix of what is added to the file.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")]
Cells = Annotated[
    str, typer.Argument(help="Raw counts: h5ad, zarr, 10x, loom, SOMA, as inspect reads them.", show_default=False)
]
MaxError = Annotated[
    float | None,
    typer.Option(help="Share of answers that may be wrong, such as 0.05: unsure cells back off to a broader type."),
]
