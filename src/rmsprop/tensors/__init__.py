"""The inputs of a step: buckets, DTensor shards, sparse rows, clipping and non-finite checks. Imports spec alone."""
