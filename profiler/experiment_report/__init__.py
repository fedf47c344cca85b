"""`step-oracle experiment report`: what clients saw in each arm of an experiment, and by how much the arms differ."""
