"""Tasks: `catalogue` has their definitions, `registry` registers them with seqio."""
