"""What the server knows: packs, experiments, engines. Nothing here knows a wire format."""
