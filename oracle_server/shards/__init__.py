"""`serve --shards N`: one parent owns the state and every change, N shards answer the steps of the same generations."""
