"""What a step is given: buckets, DTensor shards, sparse rows, clipping and non-finite checks. Imports spec alone."""
