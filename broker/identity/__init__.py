"""Who is asking: SPIFFE IDs, SVIDs, trust bundles, and the process behind a Unix socket."""
