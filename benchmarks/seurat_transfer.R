# Seurat's label transfer between two sets of cells (Stuart et al. 2019, Cell 177:1888).
#
#   Rscript seurat_transfer.R INPUT OUTPUT SEED
#
# INPUT, HDF5: /reference and /query each with data, indices, indptr (raw counts by cell, numbers from 0) and shape
# (cells, genes); /class_ids, the class of each reference cell, from 0; /num_classes. OUTPUT, HDF5: /scores (cells of the
# query, classes). Cells, genes and classes go by number, because R changes names that it cannot take.

suppressPackageStartupMessages({
  library(Matrix)
  library(Seurat)
  library(hdf5r)
})

NUM_FEATURES <- 2000
NUM_DIMS <- 30
K_ANCHOR <- 5
K_FILTER <- 200
K_SCORE <- 30
K_WEIGHT <- 50

read_cells <- function(file, name) {
  group <- file[[name]]
  shape <- group[["shape"]][]
  # Counts stored cell by cell are the columns of Seurat's genes by cells.
  counts <- new("dgCMatrix", i = group[["indices"]][], p = group[["indptr"]][], x = group[["data"]][], Dim = rev(shape))
  dimnames(counts) <- list(paste0("g", seq_len(shape[2])), paste0(substr(name, 1, 1), seq_len(shape[1])))
  NormalizeData(CreateSeuratObject(counts), normalization.method = "LogNormalize", verbose = FALSE)
}

# Each number of neighbours must be below the number of cells, and dims below those of cells and genes.
find_anchors <- function(reference, query, seed) {
  reference <- FindVariableFeatures(reference, nfeatures = NUM_FEATURES, verbose = FALSE)
  features <- VariableFeatures(reference)
  reference <- ScaleData(reference, features = features, verbose = FALSE)
  dims <- seq_len(min(NUM_DIMS, ncol(reference) - 1, length(features) - 1))
  reference <- RunPCA(reference, features = features, npcs = length(dims), seed.use = seed, verbose = FALSE)
  most <- min(ncol(reference), ncol(query)) - 1
  FindTransferAnchors(
    reference, query,
    normalization.method = "LogNormalize", reduction = "pcaproject", reference.reduction = "pca", features = features,
    dims = dims, k.anchor = min(K_ANCHOR, most), k.score = min(K_SCORE, most),
    k.filter = if (ncol(query) < K_FILTER) NA else K_FILTER, verbose = FALSE
  )
}

transfer_scores <- function(anchors, class_ids, num_classes) {
  # Where all anchors score the same, Seurat's rescaling divides 0 by 0: they count alike.
  scores <- anchors@anchors[, "score"]
  anchors@anchors[is.nan(scores), "score"] <- 1
  # Weights go to the nearest query cells that have an anchor; no more of them than there are.
  k_weight <- min(K_WEIGHT, length(unique(anchors@anchors[, "cell2"])))
  found <- TransferData(
    anchors, refdata = paste0("c", class_ids), dims = seq_along(anchors@command$dims), k.weight = k_weight, verbose = FALSE
  )
  as.matrix(found[, paste0("prediction.score.c", seq_len(num_classes) - 1)])
}

arguments <- commandArgs(trailingOnly = TRUE)
seed <- as.integer(arguments[3])
set.seed(seed)
input <- H5File$new(arguments[1], mode = "r")
anchors <- find_anchors(read_cells(input, "reference"), read_cells(input, "query"), seed)
scores <- transfer_scores(anchors, input[["class_ids"]][], input[["num_classes"]][])
output <- H5File$new(arguments[2], mode = "w")
output[["scores"]] <- t(unname(scores)) # R's columns are HDF5's rows
output$close_all()
input$close_all()
